"""Training: examples, packed batches, the loop over them, what is kept on the way. One engine for every method."""
