"""Weights to ggml blocks: scales searched for the least rounding error, weighted by how much each input matters.

`fit` chooses the grid, `round_to` the codes, `encode` does both and packs them. Grid and codes are apart so that a
method that chooses codes in another way (column by column, with error feedback) can use the same grid.

As llama.cpp's quantizer (ggml-quants.c) does, ranges are stretched and lines refitted, and an error counts for more
where the input matters and where the weight is large. Differs: scales and offsets of a super-block are chosen together
after they are rounded, each against the codes that it would give; the float16 factors are refitted to the end result;
weights without importance are weighed alike in all types.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from models.ggml.layout import Grid, decode, pack, unpack
from models.ggml.search import SMALLEST, fit_shifted, fit_symmetric
from models.ggml.types import FLOATS, TYPES, BlockType, Name, row_bytes

CHUNK_WEIGHTS = 1 << 17  # searched at once: what fits the cache with its temporaries
STRETCHES = {2: (-0.9, 0.9, 19), 3: (-0.9, 0.9, 13), 4: (-1.2, 0.9, 15), 5: (-1.2, 0.9, 13), 6: (-1.0, 1.0, 9)}
# Errors of large weights count for more than their square: (1 + w²/mean w²) to this power. On the bundled model the
# divergence of Q2_K with importance was 0.0269 at 0, 0.0216 at ½ and 0.0197 at 1; of Q3_K 0.0085, 0.0080 and 0.0081
# (llama.cpp's own encoder: 0.0208 and 0.0080).
MAGNITUDE = {2: 1.0, 3: 0.5, 4: 0.5, 5: 0.5, 6: 0.5}
NEVER_ACTIVE = 1e-4  # of the mean importance: what an input that was never active counts for, since it may still be
ROUNDS = 2  # of choosing scales and offsets anew, then both factors
# Of a group's scale and offset, what the rounding of both makes worth trying.
NEIGHBOURS = [(0, 0), *((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0))]
HALF_MOST = 65504.0
SMALLEST_HALF = 2.0**-24
FACTOR_TRIALS = torch.linspace(-1.0, 1.0, 21)


def encode(W: Tensor, name: Name, importance: Tensor | None = None) -> Tensor:
    """W: (rows, columns) floating. importance: (columns,), of each input, at least 0. Returns (rows, bytes) uint8."""
    out = torch.empty(W.shape[0], row_bytes(name, W.shape[1]), dtype=torch.uint8, device=W.device)
    if name in FLOATS:
        return out.copy_(_floats(W, name))
    rows = max(1, CHUNK_WEIGHTS // W.shape[1])
    for part, into in zip(torch.split(W, rows), torch.split(out, rows), strict=True):
        X = part.float()
        grid = _fit_rows(X, name, importance)
        into.copy_(pack(round_to(X, grid, TYPES[name]), grid, TYPES[name]))
    return out


def decode_bytes(packed: Tensor, name: Name) -> Tensor:
    """(rows, bytes) uint8 to (rows, columns) float32, as every reader of the type computes them."""
    if name == "f32":
        return packed.view(torch.float32).clone()
    if name in FLOATS:
        return packed.view(torch.float16 if name == "f16" else torch.bfloat16).float()
    codes, grid = unpack(packed, TYPES[name])
    return decode(codes, grid, TYPES[name])


def round_to(W: Tensor, grid: Grid, kind: BlockType) -> Tensor:
    """The code of the nearest grid point for each weight. W: (rows, columns) float32. Returns uint8 of that shape."""
    rows, columns = W.shape
    X = W.view(rows, -1, kind.group)
    step, shift = grid.step().unsqueeze(-1), grid.shift()
    moved = X if shift is None else X + shift.unsqueeze(-1)
    codes = (moved / step).round_().add_(kind.bias).clamp_(0, kind.top)
    return codes.to(torch.uint8).view(rows, columns)


def fit(W: Tensor, name: Name, importance: Tensor | None = None) -> Grid:
    """The grid of one tensor; no step is 0. W: (rows, columns) float32; importance: (columns,)."""
    parts = [_fit_rows(part, name, importance) for part in torch.split(W, max(1, CHUNK_WEIGHTS // W.shape[1]))]

    def joined(of: Callable[[Grid], Tensor | None]) -> Tensor | None:
        found = [value for value in map(of, parts) if value is not None]
        return torch.cat(found) if found else None

    d = torch.cat([part.d for part in parts])
    return Grid(d, joined(lambda part: part.dmin), joined(lambda part: part.scales), joined(lambda part: part.offsets))


def _fit_rows(W: Tensor, name: Name, importance: Tensor | None) -> Grid:
    """The grid of so many rows as fit the cache."""
    kind = TYPES[name]
    rows = W.shape[0]
    X = W.view(-1, kind.group).T.contiguous()  # (group, groups of all rows)
    if kind.bits == 8:
        return _solid(Grid(_half(X.abs().amax(dim=0) / 127).view(rows, -1), None, None, None))
    weight = _weight(W, importance, kind)
    low, high, count = STRETCHES[kind.bits]
    trials = torch.linspace(low, high, count)
    if kind.offset:
        step, shift, curvature = fit_shifted(X, weight, kind.top, trials)
        if kind.scales is None:
            return _solid(Grid(_half(step).view(rows, -1), _half(shift).view(rows, -1), None, None))
        return _solid(_shifted_blocks(X, weight, kind, rows, step, shift, curvature))
    step, curvature = fit_symmetric(X, weight, -kind.bias, kind.bias - 1, trials)
    if kind.scales is None:
        return _solid(Grid(_half(step).view(rows, -1), None, None, None))
    return _solid(_symmetric_blocks(X, weight, kind, rows, step, curvature))


def _solid(grid: Grid) -> Grid:
    """The same without steps of 0, which no code could be told from. Where all weights of a group are alike, the lowest
    code (the middle one where there is no offset) stands for them as before.
    """
    d = torch.where(grid.d == 0, torch.full_like(grid.d, SMALLEST_HALF), grid.d)
    scales = None if grid.scales is None else torch.where(grid.scales == 0, torch.ones_like(grid.scales), grid.scales)
    return replace(grid, d=d, scales=scales)


def _weight(W: Tensor, importance: Tensor | None, kind: BlockType) -> Tensor:
    """How much the square of each weight's error matters, (group, groups of all rows)."""
    rows, columns = W.shape
    squares = W.square().view(rows, -1, kind.columns)
    energy = squares.mean(dim=-1, keepdim=True) + SMALLEST
    weight = (squares / energy + 1).pow_(MAGNITUDE[kind.bits]).view(rows, columns)
    if importance is not None:
        importance = importance.to(W.device, torch.float32)
        mean = importance.mean()
        importance = torch.where(mean > 0, importance / mean, torch.ones_like(importance))
        weight = weight * (importance + NEVER_ACTIVE)
    return weight.view(-1, kind.group).T.contiguous()


def _symmetric_blocks(X: Tensor, weight: Tensor, kind: BlockType, rows: int, step: Tensor, curvature: Tensor) -> Grid:
    """Rounds steps (n,) to whole multiples of one factor a block. X, weight: (group, n)."""
    assert kind.scales is not None
    d, scales = _factor(_by_block(step, kind), _by_block(curvature, kind), *kind.scales)  # (B,), (G, B)
    for _ in range(ROUNDS):
        best, kept = torch.full_like(step, torch.inf), scales
        along, energy = torch.zeros_like(step), torch.zeros_like(step)
        for change in (0, -1, 1):
            tried = (scales + change).clamp_(*kind.scales)
            error, q = _error(X, weight, _by_group(d * tried), None, kind)
            better = error < best
            best = torch.where(better, error, best)
            kept = torch.where(_by_block(better, kind), tried, kept)
            wq = q * weight
            along = torch.where(better, (wq * X).sum(dim=0), along)
            energy = torch.where(better, (wq * q).sum(dim=0), energy)
        scales = kept
        numerator = (_by_block(along, kind) * scales).sum(dim=0)
        denominator = (_by_block(energy, kind) * scales.square()).sum(dim=0)
        d = _half(torch.where(denominator > SMALLEST, numerator / denominator.clamp_min(SMALLEST), d))
    return Grid(d.view(rows, -1), None, _whole(scales, rows), None)


def _shifted_blocks(
    X: Tensor, weight: Tensor, kind: BlockType, rows: int, step: Tensor, shift: Tensor, curvature: Tensor
) -> Grid:
    """Rounds steps and shifts (n,) to whole multiples of two factors a block. X, weight: (group, n)."""
    assert kind.scales is not None
    total = weight.sum(dim=0)
    d, scales = _factor(_by_block(step, kind), _by_block(curvature, kind), *kind.scales)
    dmin, offsets = _factor(_by_block(shift, kind), _by_block(total, kind), *kind.scales)
    sum_x = (X * weight).sum(dim=0)
    for _ in range(ROUNDS):
        best, kept, kept_offsets = torch.full_like(step, torch.inf), scales, offsets
        sums = [torch.zeros_like(step) for _ in range(3)]
        for change, other in NEIGHBOURS:
            tried, tried_offsets = (scales + change).clamp_(*kind.scales), (offsets + other).clamp_(*kind.scales)
            error, q = _error(X, weight, _by_group(d * tried), _by_group(dmin * tried_offsets), kind)
            better = error < best
            best = torch.where(better, error, best)
            in_block = _by_block(better, kind)
            kept = torch.where(in_block, tried, kept)
            kept_offsets = torch.where(in_block, tried_offsets, kept_offsets)
            wq = q * weight
            found = ((wq * X).sum(dim=0), (wq * q).sum(dim=0), wq.sum(dim=0))
            sums = [torch.where(better, new, old) for new, old in zip(found, sums, strict=True)]
        scales, offsets = kept, kept_offsets
        qx, qq, q_sum, x_sum, w_sum = (_by_block(one, kind) for one in (*sums, sum_x, total))
        d, dmin = _two_factors(scales, offsets, qx, qq, q_sum, x_sum, w_sum, d, dmin)
    return Grid(d.view(rows, -1), dmin.view(rows, -1), _whole(scales, rows), _whole(offsets, rows))


def _two_factors(
    s: Tensor, m: Tensor, qx: Tensor, qq: Tensor, q: Tensor, x: Tensor, total: Tensor, d: Tensor, dmin: Tensor
) -> tuple[Tensor, Tensor]:
    """Both factors (B,) with the least Σ w·(x − d·s·q + dmin·m)² over a block; the old ones where they have no answer.

    s, m: scales and offsets (G, B). The others: the weighted sums of a group that their letters say.
    """
    a, b, c = (s * s * qq).sum(dim=0), (s * m * q).sum(dim=0), (m * m * total).sum(dim=0)
    right, left = (s * qx).sum(dim=0), -(m * x).sum(dim=0)
    determinant = a * c - b * b
    solvable = determinant > 1e-6 * a * c + SMALLEST
    safe = torch.where(solvable, determinant, torch.ones_like(determinant))
    new_d, new_dmin = (c * right + b * left) / safe, (b * right + a * left) / safe
    solvable &= (new_d > 0) & (new_dmin > 0)
    return _half(torch.where(solvable, new_d, d)), _half(torch.where(solvable, new_dmin, dmin))


def _error(X: Tensor, weight: Tensor, step: Tensor, shift: Tensor | None, kind: BlockType) -> tuple[Tensor, Tensor]:
    """The weighted squared error of each group (n,), and the codes less their bias (group, n)."""
    inverse = torch.where(step == 0, torch.zeros_like(step), 1 / step)
    moved = X if shift is None else X + shift
    q = (moved * inverse).round_().clamp_(-kind.bias, kind.top - kind.bias)
    return (q * step).sub_(moved).square_().mul_(weight).sum(dim=0), q


def _by_block(values: Tensor, kind: BlockType) -> Tensor:
    """(n,) to (groups of a block, blocks)."""
    return values.view(-1, kind.groups).T


def _by_group(values: Tensor) -> Tensor:
    """(groups of a block, blocks) to (n,)."""
    return values.T.reshape(-1)


def _whole(values: Tensor, rows: int) -> Tensor:
    return _by_group(values).to(torch.int16).view(rows, -1)


def _floats(W: Tensor, name: Name) -> Tensor:
    """(rows, bytes) uint8, rounded to nearest."""
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]
    return W.to(dtype).contiguous().view(torch.uint8)


def _half(values: Tensor) -> Tensor:
    """Rounded to float16, within its range."""
    return values.clamp(-HALF_MOST, HALF_MOST).to(torch.float16).float()


def _factor(values: Tensor, weight: Tensor, least: int, greatest: int) -> tuple[Tensor, Tensor]:
    """d (blocks,) and whole numbers, shaped like values and weight (groups of a block, blocks): values ≈ d · whole."""
    if least < 0:
        d, _ = fit_symmetric(values, weight, least, greatest, FACTOR_TRIALS)
    else:
        d, best = torch.zeros_like(values[0]), torch.full_like(values[0], -1.0)
        most = values.amax(dim=0)
        inverse = torch.where(most > SMALLEST, greatest / most, torch.zeros_like(most))
        for trial in FACTOR_TRIALS.tolist():
            q = (values * (inverse * (1 + trial / greatest))).round_().clamp_(0, greatest)
            along, energy = (q * values * weight).sum(dim=0), (q * q * weight).sum(dim=0).clamp_min(SMALLEST)
            better = along.square() / energy > best
            best, d = torch.where(better, along.square() / energy, best), torch.where(better, along / energy, d)
    d = _half(d)
    whole = torch.where(d == 0, torch.zeros_like(values), values / d).round_().clamp_(least, greatest)
    return d, whole
