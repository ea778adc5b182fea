"""The block-streaming engine: a model goes through memory one decoder block at a time."""
