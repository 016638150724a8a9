"""Activations on disk: safetensors files that are written whole or not at all, and read lazily."""
