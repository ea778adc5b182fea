"""Which tokens stay of a vocabulary: those of a text, what they are merged from, what is always there, and fillers."""

from collections.abc import Set
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from models.prune.vocabularies.pieces import Pieces
from squeeze.errors import SpecInvalid


@dataclass(frozen=True)
class Kept:
    """numbers: old numbers in the order of the new ones: those that have a row, rising, and then those that have none.
    rows: of the result. found, parts, always, filled: how many of the numbers are there for that reason.
    """

    numbers: tuple[int, ...]
    rows: int
    found: int
    parts: int
    always: int
    filled: int

    @property
    def new(self) -> dict[int, int]:
        """The new number of each old one."""
        return {old: place for place, old in enumerate(self.numbers)}

    @property
    def rising(self) -> Tensor:
        """Old numbers of the rows, (rows,) int64."""
        return torch.tensor(self.numbers[: self.rows])

    def renumber(self, numbers: int) -> Tensor:
        """The new number of each of so many old ones, (numbers,) int64; -1 where it is left out."""
        table = torch.full((max(numbers, max(self.numbers) + 1),), -1)
        table[list(self.numbers)] = torch.arange(len(self.numbers))
        return table


def keep(found: Set[int], always: Set[int], pieces: Pieces, rows: int, asked: int | None, multiple: int) -> Kept:
    """found: numbers of tokens in the text. always: of those that stay whatever the text has. rows: of the original; a
    token that has none stays. asked: rows of the result; None: as few as can be.

    Raises SpecInvalid, with what would do, where the text needs more, or all of them.
    """
    closed = set(found).union(*map(pieces.parts, found))
    kept = closed.union(*map(pieces.parts, always))
    needed = sum(number < rows for number in kept)
    least = -(-needed // multiple) * multiple
    if least >= rows:
        raise SpecInvalid(
            f"the text needs {needed:,} of the model's {rows:,} tokens, of which {multiple:,} at least have to be left "
            "out: give text of fewer kinds, or take another method",
            param="method",
        )
    if asked is not None and asked < least:
        raise SpecInvalid(
            f"the text needs {needed:,} tokens, with bytes and special ones: the least size is {least}, not {asked}",
            param="size",
        )
    size = asked or least
    whole = _filled(kept, pieces, rows, size - needed)
    numbers = sorted(number for number in whole if number < rows) + sorted(number for number in whole if number >= rows)
    return Kept(
        tuple(numbers), size, len(found), len(closed) - len(found), len(kept) - len(closed), len(whole) - len(kept)
    )


def _filled(kept: Set[int], pieces: Pieces, rows: int, room: int) -> set[int]:
    """With so many more that have a row, the most frequent first, each with what it is merged from; rows without a
    token last.
    """
    whole = set(kept)
    while room:  # what took too much room before may need less by now
        for number in chain(pieces.by_rank(), range(rows)):
            more = pieces.parts(number) - whole
            if number < rows and 0 < len(more) <= room:
                whole |= more
                room -= len(more)
            if not room:
                break
    return whole
