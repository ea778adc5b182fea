"""How the learning rate rises and falls."""

import math

from squeeze.steps.descent import Schedule


def learning_rate(peak: float, schedule: Schedule, step: int, steps: int, warmup_steps: int) -> float:
    """Of a step, the first being 0: it rises in a line from nothing, then falls to nothing at `steps`, as a cosine or
    in a line, or stays. transformers' own schedules to the last bit, so that runs compare.
    """
    if step < warmup_steps:
        return peak * (step / max(1, warmup_steps))
    if schedule == "constant":
        return peak
    left = max(1, steps - warmup_steps)
    if schedule == "linear":
        return peak * max(0.0, (steps - step) / left)
    return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * ((step - warmup_steps) / left))))


def warmup_steps(share: float, steps: int) -> int:
    return math.ceil(share * steps - 1e-9)
