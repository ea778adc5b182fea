"""A step, and a size beside another, in words for people."""

from collections.abc import Collection, Mapping

SAME = 0.01
NOTHING: tuple[object, ...] = (None, (), [], {})
# Parameters that have an effect with some values of another alone; None: with any that is said.
GOES_WITH: dict[str, tuple[str, Collection[object] | None]] = {
    "speed_of": ("speed_target", None),
    "iterative": ("importance", ("perplexity",)),
    "outlier_multiple": ("distribution", ("owl",)),
    "outlier_spread": ("distribution", ("owl",)),
    "projection_rank": ("optimizer", ("galore",)),
    "projection_refresh": ("optimizer", ("galore",)),
    "projection_scale": ("optimizer", ("galore",)),
    "block_steps": ("optimizer", ("badam",)),
    "beta": ("objective", ("jsd",)),
    "double_quantization": ("base", ("nf4",)),
}


def size_text(ratio: float) -> str:
    """`2.50 times smaller`. ratio: bytes before over bytes after; within one percent they are the same size."""
    if abs(ratio - 1) < SAME:
        return "as large as before"
    return f"{ratio:.2f} times smaller" if ratio > 1 else f"{1 / ratio:.2f} times larger"


def step_text(step: Mapping[str, object]) -> str:
    """`quantize by gptq, bits 4, group_size 128`; what was left at nothing, or has no effect, is left out."""
    told = [
        f"{name} {_said(value)}" for name, value in step.items() if _counts(step, name) and _said(value) not in NOTHING
    ]
    return ", ".join([f"{step.get('kind')} by {step.get('method')}", *told])


def _said(value: object) -> object:
    """Without what was left at nothing within it."""
    if isinstance(value, Mapping):
        return {name: each for name, each in value.items() if each not in NOTHING}
    return value


def _counts(step: Mapping[str, object], name: str) -> bool:
    if name in ("kind", "method"):
        return False
    other, values = GOES_WITH.get(name, (None, None))
    if other is None or other not in step:
        return True
    return step[other] is not None if values is None else step[other] in values
