"""NormalFloat codes of 4 bits with a scale for every 64 weights in a row, as bitsandbytes lays them out.

Source: arXiv 2305.14314 §3. Blocks run over the flattened weight, so that one may reach from a row into the next.
"""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from squeeze.steps.schemes import Scheme

BLOCK = 64  # weights that share a scale
NESTED_BLOCK = 256  # scales that share a scale of their own
CHUNK_BLOCKS = 1 << 16  # worked on at once, which bounds what lies beside the result
SMALLEST = 1e-38  # scale of a block of zeros

# The quantiles of a standard normal distribution, normalized to [−1, 1], with an exact zero (appendix E of the paper).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class NormalFloat:
    """NF4[code] · scale of the block.

    codes: (out, in) uint8, 0 … 15. absmax: the scales, (blocks,) float32; where these are quantized themselves, uint8,
    and a scale is `dynamic_map()[absmax] · nested_absmax of its 256 blocks + offset`. nested_absmax:
    (⌈blocks/256⌉,) float32. offset: (1,) float32, the mean of the scales.
    """

    codes: Tensor
    absmax: Tensor
    scheme: Scheme
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        scales, table = self.scales(), torch.tensor(NF4, device=self.codes.device)
        out = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        flat, codes, step = out.view(-1), self.codes.reshape(-1), CHUNK_BLOCKS * BLOCK
        for start in range(0, len(flat), step):
            values = _in_blocks(table[codes[start : start + step].int()])
            first = start // BLOCK
            values *= scales[first : first + len(values)].unsqueeze(-1)
            flat[start : start + step] = values.view(-1)[: len(flat) - start]
        return out

    def scales(self) -> Tensor:
        """(blocks,) float32."""
        if self.nested_absmax is None or self.offset is None:
            return self.absmax
        values = dynamic_map().to(self.absmax.device)[self.absmax.int()]
        each = self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(values)]
        return values * each + self.offset

    def tensors(self) -> dict[str, Tensor]:
        plain = {"codes": self.codes, "absmax": self.absmax}
        if self.nested_absmax is None or self.offset is None:
            return plain
        return plain | {"nested_absmax": self.nested_absmax, "offset": self.offset}

    def rows(self, start: int, stop: int) -> "NormalFloat":
        """Raises ValueError for a part of the rows, which would share scales with the others; `Joined` has its own."""
        if (start, stop) != (0, len(self.codes)):
            raise ValueError("rows of one linear share scales")
        return self

    def divided(self, by: Tensor, dtype: torch.dtype) -> "NormalFloat":  # noqa: ARG002 - scales are float32 always
        return encode(self.dequantize(torch.float32) / by.unsqueeze(-1), self.scheme)


@dataclass(frozen=True)
class Joined:
    """Linears one under the other, of which none shares a scale with another."""

    parts: tuple[NormalFloat, ...]

    @property
    def scheme(self) -> Scheme:
        return self.parts[0].scheme

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([part.dequantize(dtype) for part in self.parts])

    def tensors(self) -> dict[str, Tensor]:
        """Of one linear; raises ValueError where there are more."""
        (only,) = self.parts
        return only.tensors()

    def rows(self, start: int, stop: int) -> "Joined":
        """Raises ValueError where these are not the rows of one linear."""
        ends = list(accumulate(len(part.codes) for part in self.parts))
        place = ends.index(stop)
        return Joined((self.parts[place].rows(0, stop - start),))

    def divided(self, by: Tensor, dtype: torch.dtype) -> "Joined":
        shares = torch.split(by, [len(part.codes) for part in self.parts])
        return Joined(tuple(part.divided(own, dtype) for part, own in zip(self.parts, shares, strict=True)))


def encode(W: Tensor, scheme: Scheme) -> NormalFloat:
    """Every weight as the nearest NF4 value of its block, whose largest magnitude is the scale.

    W: (out, in) float32. Source: arXiv 2305.14314 §3, with bitsandbytes 0.50's arithmetic: a value half way between two
    goes to the lower one. Where the scheme is nested, scales less their mean are rounded to an 8-bit dynamic type
    (arXiv 1511.04561) in blocks of 256.
    """
    flat = W.reshape(-1)
    blocks = -(-len(flat) // BLOCK)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    absmax = torch.empty(blocks, device=W.device)
    step = CHUNK_BLOCKS * BLOCK
    between = _midpoints(torch.tensor(NF4, device=W.device))
    for start in range(0, len(flat), step):
        found, largest = _nearest(flat[start : start + step], BLOCK, between)
        codes.view(-1)[start : start + step] = found
        absmax[start // BLOCK : start // BLOCK + len(largest)] = largest
    if not scheme.nested:
        return NormalFloat(codes, absmax, scheme)
    offset = absmax.mean()
    nested, nested_absmax = _nearest(absmax - offset, NESTED_BLOCK, _midpoints(dynamic_map().to(W.device)))
    return NormalFloat(codes, nested, scheme, nested_absmax, offset.reshape(1))


@cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type, ascending, (256,) float32: 7 decades, each twice as fine as the
    one below. Source: arXiv 1511.04561.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))


def _nearest(values: Tensor, block: int, between: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n,) uint8 of values (n,), and the largest magnitude of each block, (⌈n/block⌉,)."""
    padded = _in_blocks(values, block)
    largest = padded.abs().amax(dim=-1)
    scaled = (padded * (1.0 / largest.clamp_min(SMALLEST)).unsqueeze(-1)).clamp_(-1, 1)
    return torch.bucketize(scaled, between, out_int32=True).to(torch.uint8).view(-1)[: len(values)], largest


def _in_blocks(values: Tensor, block: int = BLOCK) -> Tensor:
    """(n,) as (⌈n/block⌉, block); zeros fill the last."""
    return torch.nn.functional.pad(values, (0, -len(values) % block)).view(-1, block)


def _midpoints(table: Tensor) -> Tensor:
    return (table[:-1] + table[1:]) / 2
