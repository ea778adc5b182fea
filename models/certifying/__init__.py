"""Consumers load what was written, in fresh processes, and say whether it is what was measured."""
