"""Past one process: harvests on many, blocks run elsewhere, sharded models."""
