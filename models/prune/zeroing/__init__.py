"""What the methods share that set single weights to zero."""
