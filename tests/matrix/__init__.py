"""The matrix of architectures: how each tiny model is built, one file for each kind."""
