"""The step that writes linear layers as products of two thinner matrices, and what a share of parameters means for it.

`models/prune/svd.py` does the work. Ranks are shared out among all linears of the model under one budget.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from pydantic import Field

from squeeze.errors import SpecInvalid
from squeeze.steps.compressing import Compress, Statistic
from squeeze.steps.schemes import Scheme

HALVINGS = 60  # of the interval in which the largest even share is searched


class SVD(Compress):
    """Writes each linear layer as a product of two thinner matrices: a singular value decomposition, cut short, of the
    weights as the layer's inputs weigh them (SVD-LLM, arXiv 2403.07378) and, unless `gradients` is off, as what
    follows weighs its outputs. Each layer's rank is what its share of the loss is worth.

    As `onnx` the two factors are stored and multiplied, so that the model is smaller and quicker; as `safetensors` they
    are multiplied out: a plain model, which loads everywhere and is as large as before.
    """

    kind: Literal["prune"] = "prune"
    method: Literal["svd"]
    params_target: float = Field(
        gt=0,
        lt=1,
        description="Share of all parameters, embeddings among them, that the model may have with its factors. A layer "
        "that factors would not make smaller stays as it is.",
    )
    ranks: Literal["loss", "uniform"] = Field(
        "loss",
        description="`loss`: over all layers those singular values go that lose least for each parameter that goes "
        "with them; layers that read one input may share their second factor. `uniform`: every layer keeps the same "
        "share of its parameters, for comparison.",
    )
    gradients: bool = Field(
        True,
        description="Weigh outputs by the gradients that the model's own predictions leave there, so that what is lost "
        "is the predicted divergence from the original. Takes forward and backward passes of a small part of the text. "
        "False: what is lost is the energy of each layer's outputs.",
    )
    asymmetric_calibration: bool = Field(
        True,
        description="Have every layer also make up for what the layers before it changed: its outputs on what it reads "
        "now are fitted to what they were in the uncompressed model. Closer to the original; the text goes through the "
        "blocks twice as often, with a second copy of the calibration activations. Experts of a mixture are left out.",
    )
    rank_multiple: Literal[8, 16, 32, 64] = Field(8, description="Ranks are multiples of it.")
    damping: float = Field(
        0.01, gt=0, le=1, description="Share of the mean diagonal that is added to the diagonal of each second moment."
    )
    statistics = frozenset({"hessian"})

    def wanted(self) -> frozenset[Statistic]:
        return self.statistics | {"drift"} if self.asymmetric_calibration else self.statistics

    def scheme(self) -> Scheme:
        return Scheme("factored", 16, "channel")


@dataclass(frozen=True)
class Sides:
    """Of one linear: outputs, inputs."""

    rows: int
    columns: int

    @property
    def whole(self) -> int:
        """Parameters as it is."""
        return self.rows * self.columns

    def factored(self, rank: int) -> int:
        """Parameters of both its factors."""
        return rank * (self.rows + self.columns)

    def kept(self, rank: int | None) -> int:
        """As either; None: it stays as it is."""
        return self.whole if rank is None else self.factored(rank)

    def even_rank(self, share: float, multiple: int) -> int | None:
        """The rank whose factors have at most that share of the parameters, or `multiple` where that is more; None
        where factors would have no fewer than the layer has.
        """
        rank = max(multiple, int(share * self.whole / (self.rows + self.columns)) // multiple * multiple)
        return rank if self.factored(rank) < self.whole else None


def budget_of(step: SVD, parameters: int, linears: Mapping[str, Sides]) -> int:
    """Parameters that all these linears may have together. parameters: of the whole model.

    Raises SpecInvalid, with the least that would do, where not even the smallest ranks are few enough.
    """
    rest = parameters - sum(one.whole for one in linears.values())
    least = sum(one.kept(one.even_rank(0.0, step.rank_multiple)) for one in linears.values())
    budget = int(step.params_target * parameters) - rest
    if budget < least:
        reached = ceil(1000 * (rest + least) / parameters) / 1000
        if reached >= 1:
            raise SpecInvalid(
                f"no layer would be smaller as two factors of rank {step.rank_multiple}: svd has nothing to do here",
                param="params_target",
            )
        raise SpecInvalid(
            f"{rest:,} of {parameters:,} parameters are not in these linears, and with rank {step.rank_multiple} for "
            f"all of them {least:,} more stay: the least that params_target can be is {reached:g}",
            param="params_target",
        )
    return budget


def uniform_ranks(step: SVD, budget: int, linears: Mapping[str, Sides]) -> dict[str, int | None]:
    """The rank of every linear where each keeps the same share, the largest that the budget allows."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _used(step, middle, linears) <= budget else (low, middle)
    return {name: one.even_rank(low, step.rank_multiple) for name, one in linears.items()}


def _used(step: SVD, share: float, linears: Mapping[str, Sides]) -> int:
    return sum(one.kept(one.even_rank(share, step.rank_multiple)) for one in linears.values())
