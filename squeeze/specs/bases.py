"""What adapters of `qlora` stand beside where a step of its own makes it: weights as GPTQ rounds them; no torch."""

from collections.abc import Iterable

from squeeze.shapes.model import Shape
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.finetuning import QLoRA
from squeeze.steps.quantization import GPTQ
from squeeze.steps.training import Train

BITS = 4
GROUP_SIZES = (128, 64, 32)


def rounding(step: Train, columns: Iterable[int]) -> GPTQ | None:
    """The step that rounds the weights before this one trains beside them; None where none does.

    columns: inputs of each linear of the decoder blocks. Its defaults are those of `quantize`, `gptq`.
    """
    if not isinstance(step, QLoRA) or step.base != "gptq":
        return None
    inputs = set(columns)
    fitting = (size for size in GROUP_SIZES if not any(each % size for each in inputs))
    return GPTQ(method="gptq", bits=BITS, group_size=step.group_size or next(fitting, "channel"))


def base_of(shape: Shape, spec: JobSpec, step: Train) -> JobSpec | None:
    """The part of a job that rounds the weights beforehand, as a job; None where none does."""
    beforehand = rounding(step, (group.columns for block in shape.blocks for group in block.groups))
    if beforehand is None:
        return None
    return spec.model_copy(update={"steps": (beforehand,), "formats": ("gptq",)})
