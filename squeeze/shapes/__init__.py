"""What config and headers tell of a model, and of what becomes of it; no torch."""
