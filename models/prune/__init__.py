"""Pruning: one file a method, each a pure function of weights and statistics to weights with zeros."""
