"""What was lost, and how quick the result is."""
