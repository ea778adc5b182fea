"""Who of several processes holds which weights of a training, and the rule by which `auto` chooses; no torch."""

from importlib.util import find_spec
from typing import Literal

from squeeze.errors import SpecInvalid

Sharding = Literal["auto", "ddp", "full", "hybrid", "offload", "zero1", "zero2", "zero3"]
Way = Literal["ddp", "full", "hybrid", "offload", "zero1", "zero2", "zero3"]

ZERO_STAGES: dict[str, int] = {"zero1": 1, "zero2": 2, "zero3": 3}  # those that DeepSpeed does
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


def refuse_without_library(sharding: Sharding, param: str = "sharding") -> None:
    """Raises SpecInvalid where DeepSpeed is asked for, and is not installed beside this. param: who asks."""
    if sharding in ZERO_STAGES and find_spec("deepspeed") is None:
        raise SpecInvalid(
            f"sharding {sharding!r} is done by DeepSpeed, which this worker has not: take full, which "
            "holds everything in parts, or have the operator install requirements/deepspeed.txt",
            param=param,
        )
