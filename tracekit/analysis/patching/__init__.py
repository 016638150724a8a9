"""Exact sweeps of patches: what is patched, the runs it takes, and what they are held against."""
