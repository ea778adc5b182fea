"""Distillation: who learns, what the teacher says, and one file for each way to learn it."""
