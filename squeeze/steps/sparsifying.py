"""The steps that set weights to zero and leave every shape as it was: unstructured, or N of every M.

`models/prune/<method>.py` does the work. The result is a plain model in the type of the source; its files are no
smaller, and it is no faster, unless something uses the zeros.
"""

from collections.abc import Mapping
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from squeeze.errors import SpecInvalid
from squeeze.steps.compressing import Compress
from squeeze.steps.schemes import Scheme
from squeeze.wire import Wire

Pattern = Literal["2:4", "4:8"]
HALF = 0.5  # of the weights, which every pattern zeroes
OUTLIER_MULTIPLE, OUTLIER_SPREAD = 5.0, 0.08  # of most models in the paper


class Zeroes(Wire):
    """What every step takes that is there to zero single weights, block by block or while the whole model learns."""

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
    def zeroed(self) -> float:
        return self.sparsity

    @property
    def group(self) -> tuple[int, int] | None:
        return None if self.pattern is None else group_of(self.pattern)


class Sparsify(Zeroes, Compress):
    """What every method shares that zeroes single weights block by block."""

    kind: Literal["prune"] = "prune"

    def scheme(self) -> Scheme:
        return Scheme("dense", 16, "channel", sparsity=self.sparsity)


class Uneven(Sparsify):
    """What the methods share that look at text, and so can tell which blocks bear more zeros than others."""

    distribution: Literal["uniform", "owl"] = Field(
        "uniform",
        description="`uniform`: each layer has the same share of zeros. `owl`: blocks with more outliers get fewer, "
        "for one more pass of the calibration text beforehand; all together have as many as asked for (arXiv "
        "2310.05175).",
    )
    outlier_multiple: float = Field(
        OUTLIER_MULTIPLE,
        gt=1,
        le=1000,
        description="With `owl`: an outlier is a weight whose magnitude times the norm of its inputs is more than so "
        "many times the mean of its block.",
    )
    outlier_spread: float = Field(
        OUTLIER_SPREAD,
        gt=0,
        lt=0.5,
        description="With `owl`: the block with the most outliers has less zeros than that with the least by twice "
        "this.",
    )

    @model_validator(mode="after")
    def _can_be_uneven(self) -> Self:
        chosen = (self.outlier_multiple, self.outlier_spread) != (OUTLIER_MULTIPLE, OUTLIER_SPREAD)
        if self.distribution == "uniform":
            if chosen:
                raise ValueError("outlier_multiple and outlier_spread go with distribution `owl`")
            return self
        if self.pattern is not None:
            raise ValueError(
                f"pattern {self.pattern} has the same share of zeros everywhere: leave it out, or `distribution`"
            )
        most = min(self.sparsity, 1 - self.sparsity) / 2
        if self.outlier_spread >= most:
            raise ValueError(
                f"with sparsity {self.sparsity:g} an outlier_spread of {self.outlier_spread:g} could leave a block no "
                f"zeros, or nothing else: take less than {most:g}"
            )
        return self


class Magnitude(Sparsify):
    """Zeroes the smallest weights of each layer. No data; the baseline that the others have to beat."""

    method: Literal["magnitude"]


class Wanda(Uneven):
    """Zeroes, in each output row, the weights of the least magnitude times norm of what they are multiplied with (arXiv
    2306.11695). The other weights stay as they are.
    """

    method: Literal["wanda"]
    statistics = frozenset({"moments"})
    whole_blocks_read = True


class SparseGPT(Uneven):
    """Zeroes weights column by column, chosen in blocks of 128 columns by what their loss would cost, and makes the
    columns still to come pay for it (arXiv 2301.00774).
    """

    method: Literal["sparsegpt"]
    damping: float = Field(
        0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal that is added to its diagonal."
    )
    statistics = frozenset({"hessian"})


class AlsoZeroes(Wire):
    """What a step takes that rounds, and zeroes in the same sweep."""

    sparsity: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of each layer's weights that become zero in the same sweep, chosen as `sparsegpt` does; the "
        "columns still to come make up for both (arXiv 2301.00774 §3.5). Left out: none, but those that are zero stay.",
    )
    pattern: Pattern | None = Field(
        None, description="`2:4` or `4:8`: half of the weights become zero so, as with `sparsegpt`."
    )

    @model_validator(mode="after")
    def _has_one_target(self) -> Self:
        if self.pattern is not None and self.sparsity not in (None, HALF):
            raise ValueError(f"pattern {self.pattern} says that half of the weights go: leave `sparsity` out")
        return self

    @property
    def zeroed(self) -> float:
        return HALF if self.pattern is not None else self.sparsity or 0.0

    @property
    def group(self) -> tuple[int, int] | None:
        return None if self.pattern is None else group_of(self.pattern)


def group_of(pattern: Pattern) -> tuple[int, int]:
    """(zeros, neighbours)."""
    zeros, neighbours = map(int, pattern.split(":"))
    return zeros, neighbours


def refuse_torn_pattern(step: Compress | Zeroes, columns: Mapping[str, int]) -> None:
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
        f"pattern {step.group[0]}:{neighbours} takes inputs by {neighbours}, and {name}{more} has {count}, not {near}. "
        + (f"Take {fits[0]}, which fits all layers, " if fits else f"Take `sparsity` {HALF} without a pattern, ")
        + "or leave those layers alone with `ignore`.",
        param="pattern",
    )


SPARSIFYING_METHODS: tuple[type[Sparsify], ...] = (Magnitude, Wanda, SparseGPT)
