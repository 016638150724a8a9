"""Activations of a whole data set, to the disk: planned in shards, each made by itself."""
