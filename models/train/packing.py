"""Examples as batches: several to a sequence, where they don't see each other, in an order drawn by the seed."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from models.train.examples import Examples

UNSCORED = -100  # what torch's cross-entropy leaves out

Row = tuple[int, ...]  # numbers of the examples in one sequence


@dataclass(frozen=True)
class Batch:
    """ids: (B, T) int64. positions: (B, T) int64, from 0 in every example, and in what fills a sequence up behind them.
    targets: (B, T) int64, the token that follows where that is learned, else UNSCORED.
    owners: (B, T) int64, the number of the example, -1 behind them.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    owners: Tensor

    @property
    def learned(self) -> int:
        return int((self.targets != UNSCORED).sum())

    @property
    def tokens(self) -> int:
        return int((self.owners >= 0).sum())

    @property
    def idle(self) -> "Batch":
        """The same, with nothing in it that counts."""
        return Batch(
            self.ids, self.positions, torch.full_like(self.targets, UNSCORED), torch.full_like(self.owners, -1)
        )

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(one.to(device) for one in (self.ids, self.positions, self.targets, self.owners)))


def rows_of(lengths: Sequence[int], length: int, *, packed: bool) -> list[Row]:
    """Which examples share a sequence of `length` tokens: best fit, the longest first (as Ding et al., arXiv
    2404.10830); each has one of its own where they are not packed.
    """
    if not packed:
        return [(number,) for number in range(len(lengths))]
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), in order
    for number in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        place = bisect_left(free, (lengths[number], -1))
        if place == len(free):
            rows.append([number])
            left, row = length - lengths[number], len(rows) - 1
        else:
            left, row = free.pop(place)
            rows[row].append(number)
            left -= lengths[number]
        if left > 0:
            insort(free, (left, row))
    return [tuple(row) for row in rows]


def rows_apart(examples: Examples, length: int, *, packed: bool) -> list[Row]:
    """As `rows_of`; where their domains are told apart, those of one sequence are of one."""
    lengths = examples.lengths
    if examples.domains is None:
        return rows_of(lengths, length, packed=packed)
    found: list[Row] = []
    for domain in sorted(set(examples.domains.tolist())):
        own = (examples.domains == domain).nonzero()[:, 0].tolist()
        rows = rows_of([lengths[number] for number in own], length, packed=packed)
        found += [tuple(own[place] for place in row) for row in rows]
    return found


def batch_of(examples: Examples, rows: Sequence[Row], filler: int = 0) -> Batch:
    """The sequences side by side, as long as the longest. filler: the token behind the shorter ones."""
    length = max(sum(len(examples.one(number)[0]) for number in row) for row in rows)
    ids = torch.full((len(rows), length), filler, dtype=torch.int64)
    positions = torch.zeros((len(rows), length), dtype=torch.int64)
    targets = torch.full((len(rows), length), UNSCORED, dtype=torch.int64)
    owners = torch.full((len(rows), length), -1, dtype=torch.int64)
    for n, row in enumerate(rows):
        start = 0
        for number in row:
            own, scored = examples.one(number)
            end = start + len(own)
            ids[n, start:end] = own
            positions[n, start:end] = torch.arange(len(own))
            targets[n, start : end - 1] = torch.where(scored[1:], own[1:].long(), UNSCORED)
            owners[n, start:end] = number
            start = end
        positions[n, start:] = torch.arange(length - start)
    return Batch(ids, positions, targets, owners)


@dataclass(frozen=True)
class Plan:
    """Which sequences each step looks at: all of them once an epoch, in an order of its own that `seed` draws.

    Batches don't end with an epoch: what is left of one begins the next batch.
    """

    rows: Sequence[Row]
    batch_size: int
    seed: int
    steps: int

    def batch(self, step: int) -> list[Row]:
        """Of a step; the first is 0. The same whoever asks, so that a training goes on where it stopped."""
        return [self._row(place) for place in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def _row(self, place: int) -> Row:
        epoch, within = divmod(place, len(self.rows))
        return self.rows[_order(len(self.rows), self.seed, epoch)[within]]


def steps_for(
    rows: Sequence[Row], lengths: Sequence[int], batch_size: int, seed: int, *, epochs: float | None, tokens: int | None
) -> int:
    """Steps that see every example so many times, or so many tokens; at least one."""
    if tokens is None:
        return max(1, math.ceil(len(rows) * (epochs or 1.0) / batch_size - 1e-9))
    sizes = [sum(lengths[number] for number in row) for row in rows]
    whole, left = divmod(tokens, sum(sizes))
    places = whole * len(rows)
    for number in _order(len(rows), seed, whole):
        if left <= 0:
            break
        left -= sizes[number]
        places += 1
    return max(1, math.ceil(places / batch_size))


def order_of(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """In which so many sequences are gone through for the time `epoch`, the first being 0."""
    dice = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(count, generator=dice).tolist())


def micro_batches(rows: Sequence[Row], size: int | None) -> Iterator[Sequence[Row]]:
    """The parts of a batch that go through the model together."""
    size = size or len(rows)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


_order = lru_cache(maxsize=2)(order_of)
