"""AutoRound: learns by sign-gradient descent which way each weight of a block is rounded, and how far grids reach.

Source: Cheng et al., arXiv 2309.05516 (SignRound), §3: an offset V in [−½, ½] for every weight before it is rounded,
and factors for either end of every group's range, learned on the squared error of the block's outputs, with a step that
falls linearly from 1/iterations to 0. We differ so: ranges start from a search for the least rounding error, weighed
by the inputs' mean squares, instead of from the extremes; the gradient of the rounding is written out, so that
nothing but the gradient of the weights has to be kept; what is kept is the end, where the step has come to nothing, and
not the best of single batches. Without iterations the start is all: rounding to nearest on a searched grid.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.quantize.grid import fit
from models.quantize.problem import Solution
from models.streaming.block import BlockWork
from models.streaming.calls import Batch, run
from models.streaming.statistics import Moments
from models.weights.codes import Codes, storable
from squeeze.steps.quantization import AutoRound
from squeeze.steps.schemes import Scheme

SAMPLES = 8  # a step looks at, at least; the paper's batch
LEAST_FACTOR, MOST_FACTOR = 0.5, 1.5  # of either end of a range


def quantize_block(work: BlockWork, step: AutoRound) -> dict[str, Solution]:
    """Codes of all linears of a block, by name."""
    squares = _mean_squares(work)
    linears = {
        name: Learned.started(
            work.weight(name), work.schemes[name], work.dtype, squares[name].mean_square if name in squares else None
        )
        for name in work.sites
    }
    if step.iterations:
        _learn(work, linears, step.iterations)
    return {name: Solution(linear.codes()) for name, linear in linears.items()}


@dataclass
class Learned:
    """What is learned of one linear.

    W: (out, groups, group_size) float32. low, high: ends of each group's range at the start, (out, groups).
    V: offsets in units of a code. below, above: factors of the ends, (out, groups); one and the same when symmetric.
    """

    W: Tensor
    low: Tensor
    high: Tensor
    V: Tensor
    below: Tensor
    above: Tensor
    scheme: Scheme
    dtype: torch.dtype

    @classmethod
    def started(cls, W: Tensor, scheme: Scheme, dtype: torch.dtype, importance: Tensor | None) -> "Learned":
        grouped = W.view(len(W), -1, scheme.columns(W.shape[1]))
        weighed = None if importance is None else importance.view(-1, grouped.shape[-1])
        scale, zero = fit(grouped, scheme.bits, scheme.symmetric, dtype, weighed)
        top = 2**scheme.bits - 1
        below = torch.ones_like(scale)
        above = below if scheme.symmetric else torch.ones_like(scale)
        return cls(grouped, -zero * scale, (top - zero) * scale, torch.zeros_like(grouped), below, above, scheme, dtype)

    @property
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, (out, groups)."""
        top = 2**self.scheme.bits - 1
        low, high = self.low * self.below, self.high * self.above
        scale = storable((high - low) / top, self.dtype)
        if self.scheme.symmetric:
            return scale, torch.full_like(scale, 2.0 ** (self.scheme.bits - 1))
        return scale, torch.round(-low / scale).clamp(1, top)

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes less their zero points, scale and zero point."""
        scale, zero = self.grid
        codes = torch.round(self.W / scale.unsqueeze(-1) + self.V)
        top = 2**self.scheme.bits - 1
        return torch.clamp(codes, -zero.unsqueeze(-1), (top - zero).unsqueeze(-1)), scale, zero

    def weight(self) -> Tensor:
        """(out, in), as a consumer computes it."""
        centred, scale, _ = self.rounded()
        return centred.mul_(scale.unsqueeze(-1)).view(len(self.W), -1)

    def codes(self) -> Codes:
        centred, scale, zero = self.rounded()
        codes = (centred + zero.unsqueeze(-1)).to(torch.uint8).view(len(self.W), -1)
        return Codes(codes, scale, zero.to(torch.uint8), self.scheme)

    def descend(self, gradient: Tensor, rate: float) -> None:
        """One step against the signs of the gradient. gradient: of the loss by `weight()`, (out, in).

        Rounding passes gradients on as if it were not there. Within the range, (codes − zero) · scale changes with V as
        the scale, and with the scale as the rounding did; at an end it is the end.
        """
        top = 2**self.scheme.bits - 1
        G = gradient.float().view_as(self.W)
        scale, zero = self.grid
        exact = self.W / scale.unsqueeze(-1)
        codes = torch.round(exact + self.V)
        at_low = codes < -zero.unsqueeze(-1)
        at_high = codes > (top - zero).unsqueeze(-1)
        inside = ~(at_low | at_high)
        slope = ((codes - exact) * inside * G).sum(dim=-1) / top  # by the range, high − low
        by_low = (G * at_low).sum(dim=-1) - slope
        by_high = (G * at_high).sum(dim=-1) + slope
        self.V.sub_(torch.sign(G * inside * scale.unsqueeze(-1)), alpha=rate).clamp_(-0.5, 0.5)
        if self.scheme.symmetric:
            self.above.sub_(torch.sign(by_low * self.low + by_high * self.high), alpha=rate)
        else:
            self.below.sub_(torch.sign(by_low * self.low), alpha=rate).clamp_(LEAST_FACTOR, MOST_FACTOR)
            self.above.sub_(torch.sign(by_high * self.high), alpha=rate)
        self.above.clamp_(LEAST_FACTOR, MOST_FACTOR)


def _mean_squares(work: BlockWork) -> dict[str, Moments]:
    """Of what each linear reads in the uncompressed block."""
    found: dict[str, Moments] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            X = given[0].reshape(-1, given[0].shape[-1])
            found.setdefault(name, Moments(X.shape[1], X.device)).add(X)

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in work.linears.items()]
    try:
        for batch in work.batches:
            run(work.module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _learn(work: BlockWork, linears: dict[str, Learned], iterations: int) -> None:
    """Moves what is learned of all linears of the block, in place."""
    inner = {id(module): name for name, module in work.module.named_modules()}
    paths = {name: f"{inner[id(module)]}.weight" for name, module in work.linears.items()}
    # The same draw whichever attempt comes to this block.
    generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(next(iter(linears)).encode()))
    draws = _draws([shape[0] for shape in work.targets.shapes], generator)
    for iteration in range(iterations):
        leaves = {name: _as_kept(linear.weight(), work, name).requires_grad_() for name, linear in linears.items()}
        weights = {paths[name]: leaf for name, leaf in leaves.items()}
        for number, rows in next(draws):
            with torch.enable_grad():
                loss = _loss(work.module, weights, work.batches.rows(number, rows), work.targets[number][rows])
                loss.backward()  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                gradient = leaf.grad.T if work.sites[name].transposed else leaf.grad
                linears[name].descend(gradient, (1 - iteration / iterations) / iterations)


def _draws(sizes: list[int], generator: torch.Generator) -> Iterator[list[tuple[int, Tensor]]]:
    """Endlessly, SAMPLES sequences at random: of so few batches as hold them, since a batch may lie on disk."""
    wanted = min(SAMPLES, sum(sizes))
    while True:
        drawn, count = [], 0
        for number in torch.randperm(len(sizes), generator=generator).tolist():
            rows = torch.randperm(sizes[number], generator=generator)[: wanted - count]
            drawn.append((number, rows))
            count += len(rows)
            if count == wanted:
                break
        yield drawn


def _loss(module: nn.Module, weights: dict[str, Tensor], batch: Batch, target: Tensor) -> Tensor:
    """Squared error of the block's outputs; summed, since only the signs of its gradient count."""
    hidden, args, kwargs = batch
    output = functional_call(module, weights, (hidden, *args), kwargs)
    output = output[0] if isinstance(output, tuple) else output
    return cast(Tensor, (output.float() - target.to(output.device).float()).square().sum())


def _as_kept(weight: Tensor, work: BlockWork, name: str) -> Tensor:
    """A weight (out, in) as its module has it."""
    kept = cast(Tensor, work.linears[name].weight)
    return (weight.T if work.sites[name].transposed else weight).to(kept.dtype).contiguous()
