"""A model on disk, as its author published it."""
