"""Pruning: one file for each method, by its wire name."""
