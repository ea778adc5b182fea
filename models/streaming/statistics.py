"""What the calibration inputs of a linear tell, collected by the engine as they pass.

Linears that read the same input share one. A method asks for what it needs (`Compress.statistics`); nothing else is
collected.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.streaming.team import Team
from squeeze.steps.compressing import Statistic

TILE = 256  # rows of a Hessian that are summed at once
WIDE_TILE = 1024
JUDGED_ROWS = 128  # of a weight, at the least, that the error of its outputs is measured on
TOKENS_AT_ONCE = 1024  # multiplied in one go
PARTS_PER_PROCESS = 4  # of a Hessian that several processes add to one after the other
SQUARED_AT_ONCE = 1 << 18  # numbers: few enough for the second-level cache
LEAST_ROUNDED = 64  # tokens, for which rounding them to integers pays


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are quicker there than in float32, and are summed in float32."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def multiplies_int8(device: torch.device) -> bool:
    """Whether products of 8-bit integers are quicker there than of floating-point numbers, and are summed exactly."""
    return device.type == "cpu" and torch.cpu._is_vnni_supported()


class Moments:
    """Per input column: mean square and largest magnitude, (in,) float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.largest = torch.zeros(columns, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, X: Tensor) -> None:
        """X: (n, in), any floating type."""
        for some in torch.split(X, max(1, SQUARED_AT_ONCE // X.shape[1])) if len(X) else ():
            part = some.float()
            self._squares += part.square().sum(dim=0)
            reach = torch.maximum(part.amax(dim=0), -part.amin(dim=0))
            self.largest = torch.maximum(self.largest, reach)
        self.count += len(X)

    def add_in_turn(self, batches: Sequence[Tensor], team: Team) -> None:
        """As `add` of each batch, after those of the processes whose turn is before this one's."""
        with team.in_turn([self._squares]):
            for X in batches:
                self.add(X)
        team.largest(self.largest)

    def sum_over(self, team: Team) -> None:
        team.sum(self._squares)
        team.largest(self.largest)

    @property
    def mean_square(self) -> Tensor:
        return (self._squares / max(self.count, 1)).float()


@dataclass(frozen=True)
class Factor:
    """Σ x xᵀ + diag(added) = G D² Gᵀ, its rows and columns standing in the order `layout`.

    G: (in, in) float32, unit lower triangular. D: (in,). diagonal: of Σ x xᵀ, (in,), in the columns' own order, as is
    `added`. damping: what was added, as a share of the mean diagonal; escalations: how often that had to be raised.
    """

    G: Tensor
    D: Tensor
    layout: Tensor
    diagonal: Tensor
    added: Tensor
    damping: float
    escalations: int

    def energy(self, V: Tensor) -> float:
        """tr(V Σ x xᵀ Vᵀ). V: (n, in) float32."""
        total = -float((V.square() * self.added).sum(dtype=torch.float64))
        V = V[:, self.layout]
        for start in range(0, len(self.G), WIDE_TILE):
            columns = slice(start, start + WIDE_TILE)
            total += float((V[:, start:] @ self.G[start:, columns]).mul_(self.D[columns]).square_().sum())
        return max(total, 0.0)


class Hessian:
    """H = 2/n · Σ x xᵀ over the n input vectors x seen, (in, in) float32 (arXiv 2210.17323 §3).

    Only the blocks on and above the diagonal are summed. Where the processor has instructions for it, inputs are
    rounded to 8-bit integers, 1,024 of them at a time and each column to a scale of its own, and multiplied exactly:
    four times as quick as in float32. What comes out is the Hessian of inputs that are a little off, by independent
    errors. Among 1,024 numbers the largest is at most 32 times their root mean square, so the errors' energy is at
    most 32²/(12 · 127²) = 0.5 % of the column's; 0.01 % is usual. GPTQ adds 1 % of the mean to the diagonal.

    Once factorised it may let go of the sum: `factor` then answers for it. in_order: the factor of the columns in their
    own order, where a method wants that beside another.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._mirrored = True
        self.count = 0
        self.factor: Factor | None = None
        self.in_order: Factor | None = None

    def add(self, X: Tensor) -> None:
        """X: (n, in), any floating type; summed in float32."""
        self._add_to(range(0, X.shape[1], TILE), X)
        self.count += len(X)

    def add_in_turn(self, batches: Sequence[Tensor], team: Team) -> None:
        """As `add` of each batch, after those of the processes whose turn is before this one's.

        Part by part: while one process adds to a part, the one before it is at the next.
        """
        starts = range(0, len(self._sum), TILE)
        parts = min(PARTS_PER_PROCESS * team.size, len(starts))
        for own in (starts[number::parts] for number in range(parts)):
            with team.in_turn([self._sum[start : start + TILE] for start in own]):
                for X in batches:
                    self._add_to(own, X)
        self.count += sum(len(X) for X in batches)

    def sum_over(self, team: Team) -> None:
        team.sum(self._sum)
        self._mirrored = False

    @property
    def sum(self) -> Tensor:
        """Σ x xᵀ, (in, in) float32; not a copy."""
        if self.factor is not None:
            raise ValueError("the sum was given up for its factor")
        if not self._mirrored:
            for start in range(0, len(self._sum), TILE):
                stop = start + TILE
                self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
                diagonal = self._sum[start:stop, start:stop]
                diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)  # its halves were rounded each for itself
            self._mirrored = True
        return self._sum

    @property
    def matrix(self) -> Tensor:
        """H, a copy."""
        return self.sum * (2.0 / max(self.count, 1))

    @property
    def diagonal(self) -> Tensor:
        """Σ x², (in,); not a copy."""
        return self._sum.diagonal() if self.factor is None else self.factor.diagonal

    def replace(self, factor: Factor) -> None:
        """Keeps a factor instead of the sum, which is as large."""
        self.factor, self._sum = factor, torch.empty(0)

    def rescaled(self, by: Tensor) -> "Hessian":
        """Of the inputs multiplied by `by`, (in,)."""
        scaled = Hessian(len(by), by.device)
        scaled._sum, scaled.count = self.sum * by * by.unsqueeze(-1), self.count
        return scaled

    def error_of(self, difference: Tensor, W: Tensor) -> float:
        """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ): the share of the layer's output energy that its compression changed.

        Of large weights, this is what 128 to 255 evenly spaced rows say.
        """
        every = max(1, len(W) // JUDGED_ROWS)
        whole = self.energy(W[::every])
        return self.energy(difference[::every]) / whole if whole > 0 else 0.0

    def energy(self, V: Tensor) -> float:
        """tr(V Σ x xᵀ Vᵀ). V: (n, in) float32."""
        if self.factor is not None:
            return self.factor.energy(V)
        total = 0.0
        for start in range(0, len(self._sum), WIDE_TILE):
            stop = start + WIDE_TILE
            H = self._sum[start:stop, start:].clone()
            H[:, : len(H)].mul_(0.5)  # all that lies right of the diagonal block counts twice
            total += 2 * float((V[:, start:stop] @ H).mul_(V[:, start:]).sum())
        return total

    def _add_to(self, starts: Iterable[int], X: Tensor) -> None:
        """To the tiles that begin at these rows. X: (n, in), any floating type."""
        for part in torch.split(X, TOKENS_AT_ONCE):
            if len(part) >= LEAST_ROUNDED and multiplies_int8(part.device):
                self._add_rounded(starts, part)
            else:
                self._add_exact(starts, part.float())
        self._mirrored = False

    def _add_rounded(self, starts: Iterable[int], X: Tensor) -> None:
        """X: (at most 1024, in), any floating type."""
        columns = X.shape[1]
        scale = torch.empty(columns, device=X.device)
        codes = torch.empty(X.shape, dtype=torch.int8, device=X.device)
        for start in range(0, columns, TILE):
            some = slice(start, start + TILE)
            part = X[:, some].to(torch.float32, copy=True)
            scale[some] = torch.maximum(part.amax(dim=0), -part.amin(dim=0)).div_(127)
            codes[:, some] = part.div_(torch.where(scale[some] > 0, scale[some], 1)).round_()  # NaN stays in the scale
        for start in starts:
            some = slice(start, start + TILE)
            product = torch._int_mm(codes[:, some].T, codes[:, start:]).float()
            self._sum[some, start:].addcmul_(product.mul_(scale[start:]), scale[some].unsqueeze(1))

    def _add_exact(self, starts: Iterable[int], X: Tensor) -> None:
        """X: (n, in) float32."""
        for start in starts:
            self._sum[start : start + TILE, start:].addmm_(X[:, start : start + TILE].T, X[:, start:])


class Drift:
    """D = Σ (x̃ − x) xᵀ, (in, in) float32, over the input vectors x seen, x̃ what each would be without compression."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, X: Tensor, originals: Tensor) -> None:
        """X, originals: (n, in), any floating type."""
        dtype = torch.bfloat16 if X.dtype == torch.bfloat16 and multiplies_bfloat16(X.device) else torch.float32
        for part, original in zip(torch.split(X, TOKENS_AT_ONCE), torch.split(originals, TOKENS_AT_ONCE), strict=True):
            self.sum += (original.float() - part.float()).to(dtype).T @ part.to(dtype)
        self.count += len(X)

    def add_in_turn(self, batches: Sequence[tuple[Tensor, Tensor]], team: Team) -> None:
        """As `add` of each batch, after those of the processes whose turn is before this one's."""
        with team.in_turn([self.sum]):
            for X, originals in batches:
                self.add(X, originals)

    def sum_over(self, team: Team) -> None:
        team.sum(self.sum)

    def rescaled(self, by: Tensor) -> "Drift":
        """Of the inputs multiplied by `by`, (in,)."""
        scaled = Drift(len(by), by.device)
        scaled.sum, scaled.count = self.sum * by * by.unsqueeze(-1), self.count
        return scaled


class Statistics:
    """Of one input that one linear or several read: the parts that were asked for."""

    def __init__(self, wanted: Collection[Statistic], columns: int, device: torch.device) -> None:
        self.moments = Moments(columns, device) if "moments" in wanted else None
        self.hessian = Hessian(columns, device) if "hessian" in wanted else None
        self.drift = Drift(columns, device) if "drift" in wanted else None
        self.count = 0

    def add(self, inputs: Tensor, originals: Tensor | None = None) -> None:
        """inputs: (…, in). originals: what they would be without compression, where that is known.

        Those of a mixture's experts, (n, in), are not compared: other tokens may come to an expert than did before.
        """
        if self.drift is not None and originals is not None and inputs.dim() > 2:
            self.drift.add(inputs.flatten(0, -2), originals.flatten(0, -2))
        X = inputs.reshape(-1, inputs.shape[-1])
        self.count += len(X)
        for part in (self.moments, self.hessian):
            if part is not None:
                part.add(X)

    def add_in_turn(self, batches: Sequence[tuple[Tensor, ...]], team: Team) -> None:
        """As `add` of every batch, (inputs,) or (inputs, originals), of every process of a team, one after the other.

        The leader's turn is the last; then it has the very numbers that it would have of all batches alone.
        """
        if team.size == 1:
            for batch in batches:
                self.add(*batch)
            return
        flat = [tuple(each.reshape(-1, each.shape[-1]) for each in batch) for batch in batches]
        self.count = sum(len(own[0]) for own in flat)
        for part in (self.moments, self.hessian):
            if part is not None:
                part.add_in_turn([own[0] for own in flat], team)
        if self.drift is not None:
            compared = zip(batches, flat, strict=True)
            self.drift.add_in_turn([(own[0], own[1]) for whole, own in compared if whole[0].dim() > 2], team)
        self._sum_counts(team)

    def sum_over(self, team: Team) -> None:
        """Makes it that of all inputs that the processes of a team saw, summed in another order than `add` has."""
        if team.size == 1:
            return
        for part in (self.moments, self.hessian, self.drift):
            if part is not None:
                part.sum_over(team)
        self._sum_counts(team)

    def _sum_counts(self, team: Team) -> None:
        parts = [part for part in (self.moments, self.hessian, self.drift) if part is not None]
        told = team.gather([self.count, *(part.count for part in parts)])
        self.count, *counts = (sum(one) for one in zip(*told, strict=True))
        for part, count in zip(parts, counts, strict=True):
            part.count = count

    def rescaled(self, by: Tensor) -> "Statistics":
        """Of the inputs multiplied by `by`, (in,) float32."""
        scaled = Statistics((), len(by), by.device)
        scaled.count = self.count
        scaled.hessian = self.hessian and self.hessian.rescaled(by)
        scaled.drift = self.drift and self.drift.rescaled(by)
        if self.moments is not None:
            scaled.moments = Moments(len(by), by.device)
            scaled.moments.count = self.count
            scaled.moments._squares = self.moments._squares * by.double().square()
            scaled.moments.largest = self.moments.largest * by
        return scaled

    def error_of(self, difference: Tensor, W: Tensor) -> float:
        """The share of the layer's output energy that its compression changed; without H by the columns' energies."""
        if self.hessian is not None:
            return self.hessian.error_of(difference, W)
        weights = torch.ones(W.shape[1], device=W.device) if self.moments is None else self.moments.mean_square
        changed = (difference.square() * weights).sum(dtype=torch.float64)
        whole = (W.square() * weights).sum(dtype=torch.float64)
        return float(changed / whole) if whole > 0 else 0.0
