"""What the methods share that make a plain, smaller model."""
