"""What the steps share whose work goes through a model block by block: those that quantize, those that zero weights."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from squeeze.steps.schemes import Scheme
from squeeze.wire import Wire

Statistic = Literal["moments", "hessian", "drift"]
Ignored = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=200)], ...],
    Field(
        max_length=64,
        description="Linear layers to leave as they are: shell patterns over their full names, for example "
        "`model.layers.0.*` or `*.down_proj`. Embeddings, norms and the output head are always left alone.",
    ),
]


class Compress(Wire):
    """Linears of the decoder blocks are stored in another way, each from its weights and what it is given.

    What a method needs of the calibration inputs of each linear is `statistics`: per-column `moments`, the `hessian`,
    their `drift` from what the linear would read in the uncompressed model, or nothing. A method that works on whole
    blocks (`by_block`) sees the inputs themselves. Statistics are of what the compressed linears before put out, those
    of the same block too, unless `whole_blocks_read`: then of what they put out before any of the block was compressed.
    """

    kind: str
    method: str
    ignore: Ignored = ()
    statistics: ClassVar[frozenset[Statistic]] = frozenset()
    by_block: ClassVar[bool] = False
    whole_blocks_read: ClassVar[bool] = False

    def wanted(self) -> frozenset[Statistic]:
        """The statistics that this step needs, where its options decide."""
        return self.statistics

    @property
    def zeroed(self) -> float:
        """The share of each weight that it sets to zero."""
        return 0.0

    @property
    def group(self) -> tuple[int, int] | None:
        """(zeros, neighbours) where the zeros stand in a pattern."""
        return None

    @property
    def scales_cache(self) -> bool:
        """Whether it finds scales for the cache of keys and values."""
        return False

    @property
    def rotates(self) -> bool:
        """Whether rotations are folded into the weights first."""
        return False

    @property
    def reads_inputs(self) -> bool:
        """Whether it looks at what the layers that it compresses are given."""
        return bool(self.wanted()) or self.by_block or self.scales_cache

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at text."""
        return self.reads_inputs

    def scheme(self) -> Scheme:
        """How a linear's weights are stored, where nothing makes an exception."""
        raise TypeError(f"{type(self).__name__} says no scheme")
