"""Every step that a job may have.

A method is found by its name: `kind` and `method` are the folder and the file in `models/` (`quantize`, `gptq` ->
`models/quantize/gptq.py`). A new method adds its class, in the module of its kind beside this one, and that file,
nothing else.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import Discriminator, Tag

from squeeze.steps.distillation import DISTILLING_METHODS
from squeeze.steps.factoring import SVD
from squeeze.steps.finetuning import TRAINING_METHODS
from squeeze.steps.merging import MERGING_METHODS, Merge
from squeeze.steps.movement import Movement
from squeeze.steps.quantization import METHODS, Quantize
from squeeze.steps.slimming import SLIMMING_METHODS, Slim
from squeeze.steps.sparsifying import SPARSIFYING_METHODS, Sparsify
from squeeze.steps.training import Train

Kind = Literal["quantize", "prune", "finetune", "distill", "merge"]

Method = type[Quantize] | type[Sparsify] | type[SVD] | type[Slim] | type[Train] | type[Merge]
STEPS: tuple[Method, ...] = (
    *METHODS,
    *SLIMMING_METHODS,
    *SPARSIFYING_METHODS,
    Movement,
    SVD,
    *TRAINING_METHODS,
    *DISTILLING_METHODS,
    *MERGING_METHODS,
)


def _tag(value: Any) -> str | None:
    if isinstance(value, dict):
        return f"{value.get('kind')}.{value.get('method')}"
    # anything may stand here (a number, a string): pydantic then says which methods there are
    return f"{getattr(value, 'kind', None)}.{getattr(value, 'method', None)}"


def tag_of(method: Method) -> str:
    """`kind.method` of a step's class, for example `quantize.gptq`."""
    return ".".join(get_args(method.model_fields[name].annotation)[0] for name in ("kind", "method"))


if TYPE_CHECKING:
    Step = Quantize | Sparsify | SVD | Slim | Train | Merge
else:
    Step = Annotated[Union[tuple(Annotated[one, Tag(tag_of(one))] for one in STEPS)], Discriminator(_tag)]  # noqa: UP007 - of as many as there are
