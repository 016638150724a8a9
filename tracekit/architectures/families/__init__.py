"""One file of declarations for each family of models; each has a FAMILY."""
