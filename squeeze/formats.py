"""What each format can hold, and who loads it: facts that are known without looking at a model.

`models/formats/<name>.py` writes the format; this table lets the service refuse at submit what it could not write.
"""

from dataclasses import dataclass

from squeeze.errors import FormatUnfit
from squeeze.specs import JobSpec
from squeeze.steps import Format, GroupSize, Quantize


@dataclass(frozen=True)
class Capacity:
    """What one format can hold."""

    bits: tuple[int, ...]
    group_sizes: tuple[GroupSize, ...]
    asymmetric: bool
    consumers: tuple[str, ...]


CAPACITIES: dict[Format, Capacity] = {
    "compressed-tensors": Capacity(
        bits=(2, 3, 4, 8),
        group_sizes=(32, 64, 128, "channel"),
        asymmetric=True,
        consumers=("transformers", "vllm"),
    ),
    "gptq": Capacity(
        bits=(2, 3, 4, 8),
        group_sizes=(32, 64, 128, "channel"),
        asymmetric=True,
        consumers=("transformers", "gptqmodel", "vllm"),
    ),
}


def refuse_unfit(spec: JobSpec) -> None:
    """Raises FormatUnfit, naming the parameter and what would do, where a format can't hold what a step makes."""
    for number, step in enumerate(spec.steps):
        if not isinstance(step, Quantize):
            continue
        for name in spec.formats:
            capacity = CAPACITIES[name]
            asked: tuple[tuple[str, object, tuple[object, ...]], ...] = (
                ("bits", step.bits, capacity.bits),
                ("group_size", step.group_size, capacity.group_sizes),
                ("symmetric", step.symmetric, (True, False) if capacity.asymmetric else (True,)),
            )
            for field, value, held in asked:
                if value not in held:
                    raise FormatUnfit(
                        f"{name} can't hold {field}={value}; it holds {', '.join(map(str, held))}. "
                        f"Change the step or leave {name} out of `formats`.",
                        param=f"steps.{number}.{field}",
                    )
