"""The bytes of ggml's blocks: from codes, scales and offsets, and back. Nothing is rounded here.

Source: ggml-common.h and the reference dequantizers of ggml-quants.c. All arithmetic is on strided bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.ggml.types import BlockType


@dataclass(frozen=True)
class Grid:
    """What codes of one tensor are rounded to.

    d: (rows, blocks) float32, exact in float16. dmin: the same for offsets; None where the type has none.
    scales: (rows, groups) int16; None where a block is one group. offsets: the same; None where the type has none.
    """

    d: Tensor
    dmin: Tensor | None
    scales: Tensor | None
    offsets: Tensor | None

    def step(self) -> Tensor:
        """The distance of neighbouring values, (rows, groups) float32; negative where the type allows it."""
        return _times(self.d, self.scales)

    def shift(self) -> Tensor | None:
        """What is taken from every value, (rows, groups) float32."""
        return None if self.dmin is None else _times(self.dmin, self.offsets)


def _times(factor: Tensor, whole: Tensor | None) -> Tensor:
    if whole is None:
        return factor
    groups = whole.shape[1] // factor.shape[1]
    return factor.repeat_interleave(groups, dim=1) * whole.float()


def decode(codes: Tensor, grid: Grid, kind: BlockType) -> Tensor:
    """The values, (rows, columns) float32, as every reader of the type computes them. codes: (rows, columns) uint8."""
    rows, columns = codes.shape
    values = codes.view(rows, -1, kind.group).float().sub_(kind.bias).mul_(grid.step().unsqueeze(-1))
    shift = grid.shift()
    if shift is not None:
        values.sub_(shift.unsqueeze(-1))
    return values.view(rows, columns)


def pack(codes: Tensor, grid: Grid, kind: BlockType) -> Tensor:
    """codes: (rows, columns) uint8, columns whole blocks. Returns (rows, bytes) uint8."""
    rows, columns = codes.shape
    blocks = rows * columns // kind.columns
    q = codes.reshape(blocks, kind.columns)
    d = _half_bytes(grid.d)
    if kind.scales is None:
        parts = [d] if grid.dmin is None else [d, _half_bytes(-grid.dmin)]
        parts += [q ^ 128] if kind.bits == 8 else [*_fifth_bits(q, kind), _halves(q)]
        return torch.cat(parts, dim=1).view(rows, -1)
    assert grid.scales is not None
    scales = grid.scales.reshape(blocks, kind.groups)
    if kind.name == "q3_k":
        return torch.cat([_planes(q >> 2, 1), _planes(q & 3, 2), _six_bits(scales + 32), d], dim=1).view(rows, -1)
    if kind.name == "q6_k":
        parts = [_nibbles(q & 15, 64), _planes(q >> 4, 2), scales.to(torch.int8).view(torch.uint8), d]
        return torch.cat(parts, dim=1).view(rows, -1)
    assert grid.dmin is not None
    assert grid.offsets is not None
    dmin, offsets = _half_bytes(grid.dmin), grid.offsets.reshape(blocks, kind.groups)
    if kind.name == "q2_k":
        packed_scales = (scales | (offsets << 4)).to(torch.uint8)
        return torch.cat([packed_scales, _planes(q, 2), d, dmin], dim=1).view(rows, -1)
    fifth = [_planes(q >> 4, 1)] if kind.bits == 5 else []
    parts = [d, dmin, _scales_and_offsets(scales, offsets), *fifth, _nibbles(q & 15, 32)]
    return torch.cat(parts, dim=1).view(rows, -1)


def unpack(packed: Tensor, kind: BlockType) -> tuple[Tensor, Grid]:
    """The inverse of `pack`: codes (rows, columns) uint8 and the grid."""
    rows = packed.shape[0]
    raw = packed.reshape(-1, kind.bytes)
    columns = packed.shape[1] // kind.bytes * kind.columns

    def codes(q: Tensor) -> Tensor:
        return q.reshape(rows, columns)

    def halves(part: Tensor) -> Tensor:
        return part.contiguous().view(torch.float16).float().view(rows, -1)

    def whole(part: Tensor) -> Tensor:
        return part.to(torch.int16).reshape(rows, -1)

    if kind.scales is None:
        d, rest = raw[:, :2], raw[:, 2:]
        dmin = None
        if kind.offset:
            dmin, rest = -halves(rest[:, :2]), rest[:, 2:]
        if kind.bits == 8:
            return codes(rest ^ 128), Grid(halves(d), dmin, None, None)
        high = None
        if kind.bits == 5:
            bits = torch.arange(8, dtype=torch.uint8, device=raw.device)
            high = ((rest[:, :4].unsqueeze(-1) >> bits) & 1).reshape(-1, 32)
            rest = rest[:, 4:]
        low = torch.cat([rest & 15, rest >> 4], dim=1)
        return codes(low if high is None else low | (high << 4)), Grid(halves(d), dmin, None, None)
    if kind.name == "q3_k":
        hmask, qs, packed_scales, d = torch.split(raw, [32, 64, 12, 2], dim=1)
        q = _from_planes(qs, 2) | (_from_planes(hmask, 1) << 2)
        return codes(q), Grid(halves(d), None, whole(_from_six_bits(packed_scales)) - 32, None)
    if kind.name == "q6_k":
        ql, qh, scales, d = torch.split(raw, [128, 64, 16, 2], dim=1)
        q = _from_nibbles(ql, 64) | (_from_planes(qh, 2) << 4)
        return codes(q), Grid(halves(d), None, whole(scales.contiguous().view(torch.int8)), None)
    if kind.name == "q2_k":
        packed_scales, qs, d, dm = torch.split(raw, [16, 64, 2, 2], dim=1)
        return codes(_from_planes(qs, 2)), Grid(
            halves(d), halves(dm), whole(packed_scales & 15), whole(packed_scales >> 4)
        )
    d, dm, twelve, *fifth, qs = torch.split(raw, [2, 2, 12, *([32] if kind.bits == 5 else []), 128], dim=1)
    q = _from_nibbles(qs, 32)
    if fifth:
        q = q | (_from_planes(fifth[0], 1) << 4)
    scales, offsets = _from_scales_and_offsets(twelve)
    return codes(q), Grid(halves(d), halves(dm), whole(scales), whole(offsets))


def _half_bytes(values: Tensor) -> Tensor:
    """(blocks, 2) uint8, float16 little-endian."""
    return values.reshape(-1, 1).to(torch.float16).view(torch.uint8)


def _halves(q: Tensor) -> Tensor:
    """Blocks of 32: code i and code i + 16 share a byte."""
    return (q[:, :16] & 15) | ((q[:, 16:] & 15) << 4)


def _fifth_bits(q: Tensor, kind: BlockType) -> list[Tensor]:
    """Blocks of 32: the fifth bit of code i is bit i of a 32-bit word."""
    if kind.bits == 4:
        return []
    shifts = torch.arange(8, dtype=torch.uint8, device=q.device)
    return [((q >> 4).view(-1, 4, 8) << shifts).sum(dim=-1, dtype=torch.uint8)]


def _planes(q: Tensor, bits: int) -> Tensor:
    """Codes of 1 or 2 bits in bytes of 32 lanes: lane l of a run holds codes l, l + 32, l + 64 …, lowest bits first."""
    run = 8 // bits
    runs = q.reshape(q.shape[0], -1, run, 32)
    packed: Tensor = runs[:, :, 0].clone()
    for place in range(1, run):
        packed |= runs[:, :, place] << (place * bits)
    return packed.flatten(1)


def _from_planes(packed: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(1, 1, -1, 1)
    codes: Tensor = (packed.reshape(packed.shape[0], -1, 1, 32) >> shifts) & (2**bits - 1)
    return codes.flatten(1)


def _nibbles(q: Tensor, lanes: int) -> Tensor:
    """Codes of 4 bits in bytes of so many lanes: lane l of a run holds codes l and l + lanes."""
    runs = q.reshape(q.shape[0], -1, 2, lanes)
    return (runs[:, :, 0] | (runs[:, :, 1] << 4)).flatten(1)


def _from_nibbles(packed: Tensor, lanes: int) -> Tensor:
    runs = packed.reshape(packed.shape[0], -1, 1, lanes)
    return torch.cat([runs & 15, runs >> 4], dim=2).flatten(1)


def _six_bits(scales: Tensor) -> Tensor:
    """Q3_K: 16 scales of 6 bits in 12 bytes: the low nibbles of j and j + 8, then two high bits of j, j + 4, …"""
    low, high = scales & 15, (scales >> 4).reshape(-1, 4, 4)
    first = low[:, :8] | (low[:, 8:] << 4)
    last = high[:, 0] | (high[:, 1] << 2) | (high[:, 2] << 4) | (high[:, 3] << 6)
    return torch.cat([first, last], dim=1).to(torch.uint8)


def _from_six_bits(packed: Tensor) -> Tensor:
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], dim=1)
    high = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    return low | (high << 4)


def _scales_and_offsets(scales: Tensor, offsets: Tensor) -> Tensor:
    """Q4_K, Q5_K: eight scales and offsets of 6 bits in 12 bytes; the last four's high bits lie over the first's."""
    s, m = scales.to(torch.uint8), offsets.to(torch.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    third = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], dim=1)


def _from_scales_and_offsets(packed: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = torch.split(packed, 4, dim=1)
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], dim=1)
    offsets = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], dim=1)
    return scales, offsets
