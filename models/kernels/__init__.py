"""Kernels of our own for GPUs, imported where their compiler is."""
