"""What the calibration inputs of a linear tell, collected by the engine as they pass.

Linears that read the same input share one. A method asks for what it needs (`Quantize.statistics`); nothing else is
collected.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from squeeze.steps import Statistic

TILE = 256  # rows of a Hessian that are summed at once
WIDE_TILE = 1024
JUDGED_ROWS = 1024  # of a weight, at the least, that the error of its outputs is measured on
TOKENS_AT_ONCE = 1024  # multiplied in one go
LEAST_TOKENS = 512  # in a batch whose products may be rounded
# Of the mean diagonal, from rounding the products; GPTQ adds 1 % to the diagonal. On the bundled model this and no
# rounding at all differ by less than two draws of the calibration text do.
MOST_NOISE = 0.009


class Moments:
    """Per input column: mean square and largest magnitude, (in,) float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.largest = torch.zeros(columns, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, X: Tensor) -> None:
        """X: (n, in), any floating type."""
        if len(X):
            X = X.float()
            self._squares += X.square().sum(dim=0)
            self.largest = torch.maximum(self.largest, X.abs().amax(dim=0))
            self.count += len(X)

    @property
    def mean_square(self) -> Tensor:
        return (self._squares / max(self.count, 1)).float()


class Hessian:
    """H = 2/n · Σ x xᵀ over the n input vectors x seen, (in, in) float32 (arXiv 2210.17323 §3).

    Only the blocks on and above the diagonal are summed. Inputs in bfloat16 are multiplied in bfloat16 where the
    processor has instructions for that, the products of 1,024 of them at a time rounded to bfloat16 and summed in
    float32: twice as quick as float32, and as good as long as the rounding stays below the damping. That is looked at
    on the first of them: where there are too few tokens or columns move together too much, all is done in float32.

    tokens: how many inputs are expected; 0: not known, which takes float32.
    Cholesky factors are kept by damping and column order, so that the second of them costs no factorisation.
    """

    def __init__(self, columns: int, device: torch.device, tokens: int = 0) -> None:
        self._expected = tokens
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._mirrored = True
        self._coarse: bool | None = None  # whether products are rounded to bfloat16; None: not looked at yet
        self.count = 0
        self.factors: dict[object, tuple[Tensor, Tensor, float, int]] = {}

    def add(self, X: Tensor) -> None:
        """X: (n, in), any floating type; summed in float32."""
        if not len(X):
            return
        if self._coarse is None:
            self._coarse = self._may_be_coarse(X)
        (self._add_coarse if self._coarse else self._add_exact)(X)
        self.count += len(X)
        self._mirrored = False

    @property
    def sum(self) -> Tensor:
        """Σ x xᵀ, (in, in) float32; not a copy."""
        if not self._mirrored:
            for start in range(0, len(self._sum), TILE):
                stop = start + TILE
                self._sum[stop:, start:stop] = self._sum[start:stop, stop:].T
            self._mirrored = True
        return self._sum

    @property
    def matrix(self) -> Tensor:
        """H, a copy."""
        return self.sum * (2.0 / max(self.count, 1))

    @property
    def product_dtype(self) -> torch.dtype:
        """In which products whose size is that of the rounding error of this sum may be taken."""
        return torch.bfloat16 if self._coarse else torch.float32

    def rescaled(self, by: Tensor) -> "Hessian":
        """Of the inputs multiplied by `by`, (in,)."""
        scaled = Hessian(len(by), by.device)
        scaled._sum, scaled.count = self.sum * by * by.unsqueeze(-1), self.count
        return scaled

    def error_of(self, difference: Tensor, W: Tensor) -> float:
        """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ): the share of the layer's output energy that its compression changed.

        Of large weights, this is what 1,024 to 2,047 evenly spaced rows say.
        """
        every = max(1, len(W) // JUDGED_ROWS)
        whole = self._energy(W[::every])
        return self._energy(difference[::every]) / whole if whole > 0 else 0.0

    def _energy(self, W: Tensor) -> float:
        """tr(W Σ x xᵀ Wᵀ), from the blocks on and above the diagonal. W: (out, in) float32."""
        dtype = self.product_dtype
        V, total = W.to(dtype), 0.0
        for start in range(0, len(self._sum), WIDE_TILE):
            stop = start + WIDE_TILE
            H = self._sum[start:stop, start:].to(dtype, copy=True)
            H[:, : len(H)].mul_(0.5)  # all that lies right of the diagonal block counts twice
            total += 2 * float((V[:, start:stop] @ H).mul_(V[:, start:]).sum(dtype=torch.float32))
        return total

    def _may_be_coarse(self, X: Tensor) -> bool:
        """Whether products of inputs like the first batch X may be rounded to bfloat16."""
        if (
            X.dtype != torch.bfloat16
            or not _multiplies_bfloat16(X.device)
            or len(X) < LEAST_TOKENS
            or not self._expected
        ):
            return False
        first = X[:TOKENS_AT_ONCE]
        self._add_coarse(first)
        # Errors of different products are independent: with their number they grow by its root, the sum by itself.
        fine = self._rounding_noise() * math.sqrt(len(first) / self._expected) <= MOST_NOISE
        self._sum.zero_()
        return fine

    def _rounding_noise(self) -> float:
        """Spectral norm that the products' rounding to bfloat16 is expected to have, as a share of the mean diagonal.

        Rounding errs by 0.0017 of an entry in the root mean square, and a symmetric (n, n) matrix of independent
        entries of mean square v has a norm of 2 √(n v).
        """
        n, squares = len(self._sum), 0.0
        for start in range(0, n, TILE):
            rows = self._sum[start : start + TILE, start:]
            squares += 2 * float(rows.square().sum()) - float(rows[:, : len(rows)].square().sum())
        mean = float(self._sum.diagonal().mean())
        return 2 * 0.0017 * (squares / n) ** 0.5 / mean if mean > 0 else 0.0

    def _add_coarse(self, X: Tensor) -> None:
        for part in torch.split(X, TOKENS_AT_ONCE):
            for start in range(0, X.shape[1], TILE):
                self._sum[start : start + TILE, start:] += part[:, start : start + TILE].T @ part[:, start:]

    def _add_exact(self, X: Tensor) -> None:
        for part in torch.split(X, TOKENS_AT_ONCE):
            exact = part.float()
            for start in range(0, X.shape[1], TILE):
                self._sum[start : start + TILE, start:].addmm_(exact[:, start : start + TILE].T, exact[:, start:])


class Drift:
    """D = Σ (x̃ − x) xᵀ, (in, in) float32, over the input vectors x seen, x̃ what each would be without compression."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, X: Tensor, originals: Tensor) -> None:
        """X, originals: (n, in), any floating type."""
        dtype = torch.bfloat16 if X.dtype == torch.bfloat16 and _multiplies_bfloat16(X.device) else torch.float32
        for part, original in zip(torch.split(X, TOKENS_AT_ONCE), torch.split(originals, TOKENS_AT_ONCE), strict=True):
            self.sum += (original.float() - part.float()).to(dtype).T @ part.to(dtype)
        self.count += len(X)

    def rescaled(self, by: Tensor) -> "Drift":
        """Of the inputs multiplied by `by`, (in,)."""
        scaled = Drift(len(by), by.device)
        scaled.sum, scaled.count = self.sum * by * by.unsqueeze(-1), self.count
        return scaled


class Statistics:
    """Of one input that one linear or several read: the parts that were asked for. tokens: how many are expected."""

    def __init__(self, wanted: Collection[Statistic], columns: int, device: torch.device, tokens: int = 0) -> None:
        self.moments = Moments(columns, device) if "moments" in wanted else None
        self.hessian = Hessian(columns, device, tokens) if "hessian" in wanted else None
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


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are quicker there than in float32, and are summed in float32."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
