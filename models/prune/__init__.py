"""Pruning: one file for each method, by its wire name. Some zero weights, others make the model smaller."""
