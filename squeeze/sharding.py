"""Who of several processes holds which weights of a training, and the rule by which `auto` chooses; no torch."""

from typing import Literal

Sharding = Literal["auto", "ddp", "full", "hybrid", "offload", "zero1", "zero2", "zero3"]
Way = Literal["ddp", "full", "hybrid", "offload", "zero1", "zero2", "zero3"]

LEARNING_BYTES = 16  # of a weight that learns: itself, its gradient and AdamW's two moments, each float32
ROOM = 0.5  # of a device's free memory that weights and state may take; the rest is for activations and logits


def state_bytes(parameters: int, learning: int, each: int) -> int:
    """What one process holds whose weights are whole. learning: of the parameters. each: bytes of one that doesn't."""
    return learning * LEARNING_BYTES + (parameters - learning) * each


def way_for(needed_bytes: int, free_bytes: int, processes: int) -> Way:
    """What `auto` comes to: whole weights everywhere where they fit, which needs the least talk; else a part each; else
    a part each that stays in host memory until its turn comes.

    needed_bytes: see `state_bytes`. free_bytes: of a device.
    """
    room = free_bytes * ROOM
    if needed_bytes <= room:
        return "ddp"
    return "full" if needed_bytes <= room * processes else "offload"
