"""The steps that set weights to zero and leave every shape as it was: unstructured, or N of every M.

`models/prune/<method>.py` does the work. The result is a plain model in the type of the source; its files are no
smaller, and it is no faster, unless something uses the zeros.
"""

from collections.abc import Mapping
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from squeeze.compressing import Compress
from squeeze.errors import SpecInvalid
from squeeze.schemes import Scheme

Pattern = Literal["2:4", "4:8"]
HALF = 0.5  # of the weights, which every pattern zeroes


class Sparsify(Compress):
    """What every method shares that zeroes single weights."""

    kind: Literal["prune"] = "prune"
    method: str
    sparsity: float = Field(0.5, gt=0, lt=1, description="Share of each layer's weights that become zero.")
    pattern: Pattern | None = Field(
        None,
        description="`2:4`: of every 4 neighbours in a row 2 become zero, which kernels of NVIDIA's GPUs since "
        "Ampere can use; `4:8`: of every 8, 4. Left out: zeros may stand anywhere.",
    )

    @model_validator(mode="after")
    def _has_one_target(self) -> Self:
        if self.pattern is not None and self.sparsity != HALF:
            raise ValueError(f"pattern {self.pattern} says that half of the weights go: leave `sparsity` out")
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """(zeros, neighbours) of the pattern."""
        if self.pattern is None:
            return None
        zeros, neighbours = map(int, self.pattern.split(":"))
        return zeros, neighbours

    def scheme(self) -> Scheme:
        return Scheme("dense", 16, "channel")


class Magnitude(Sparsify):
    """Zeroes the smallest weights of each layer. No data; the baseline that the others have to beat."""

    method: Literal["magnitude"]


class Wanda(Sparsify):
    """Zeroes, in each output row, the weights of the least magnitude times norm of what they are multiplied with (arXiv
    2306.11695). The other weights stay as they are.
    """

    method: Literal["wanda"]
    statistics = frozenset({"moments"})
    whole_blocks_read = True


class SparseGPT(Sparsify):
    """Zeroes weights column by column, chosen in blocks of 128 columns by what their loss would cost, and makes the
    columns still to come pay for it (arXiv 2301.00774).
    """

    method: Literal["sparsegpt"]
    damping: float = Field(
        0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal that is added to its diagonal."
    )
    statistics = frozenset({"hessian"})


def refuse_torn_pattern(step: Sparsify, columns: Mapping[str, int]) -> None:
    """Raises SpecInvalid, with what would do, where a layer's inputs don't come in groups of the pattern. columns:
    inputs of each layer by its name.
    """
    if step.group is None:
        return
    neighbours = step.group[1]
    torn = {name: count for name, count in columns.items() if count % neighbours}
    if not torn:
        return
    name, count = next(iter(torn.items()))
    more = f" (and {len(torn) - 1} more layers)" if len(torn) > 1 else ""
    less = count - count % neighbours
    near = f"{less} or {less + neighbours}" if less else f"{neighbours}"
    fits = [one for one in get_args(Pattern) if not any(each % int(one[-1]) for each in columns.values())]
    raise SpecInvalid(
        f"pattern {step.pattern} takes inputs by {neighbours}, and {name}{more} has {count}, not {near}. "
        + (f"Take {fits[0]}, which fits all layers, " if fits else f"Take `sparsity` {HALF} without a pattern, ")
        + "or leave those layers alone with `ignore`.",
        param="pattern",
    )


SPARSIFYING_METHODS: tuple[type[Sparsify], ...] = (Magnitude, Wanda, SparseGPT)
