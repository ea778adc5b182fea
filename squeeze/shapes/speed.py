"""How many times as fast a smaller model would be if nothing but its products took time; no torch.

A target of speed is met as measured, by the worker. What can't be met at all is known before, and so is about how large
the result will be.
"""

from collections.abc import Sequence

from squeeze.errors import SpecInvalid
from squeeze.steps.slimming import Paced, Part

PROMPT_TOKENS = 128  # that go through the blocks at once; the head is of the last one alone


def products(blocks: float, head: float, part: Part) -> float:
    """Multiply-adds. blocks: weights of all blocks that a token meets. head: weights of the output head."""
    return (PROMPT_TOKENS if part == "prompt" else 1) * blocks + head


def blocks_at_speed(step: Paced, active: Sequence[float], head: float) -> int:
    """About how many blocks a target of speed leaves. active: weights of each block that a token meets.

    Raises SpecInvalid where one block alone would not be quick enough if all else took no time.
    """
    assert step.speed_target is not None, "asked for where there is one"
    count, whole = len(active), sum(active)
    most = whole / max(min(active, default=1.0), 1.0)
    if step.speed_target >= most:
        raise SpecInvalid(
            f"with one decoder block of {count} left, a model is less than {most:.3g} times as fast: speed_target is "
            f"less than that, not {step.speed_target:g}",
            param="speed_target",
        )
    asked = products(whole, head, step.speed_of) / step.speed_target
    fitting = (left for left in range(count - 1, 0, -1) if products(whole * left / count, head, step.speed_of) <= asked)
    return next(fitting, 1)
