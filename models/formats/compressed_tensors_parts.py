"""What the tensors of one linear are in compressed-tensors, for each layout.

- `pack-quantized`: `weight_packed` int32 (out, in·bits/32), codes packed along `in`; `weight_scale` (out, groups) in
  the model's dtype; `weight_shape` int64 (2,); and when asymmetric `weight_zero_point` int32 (out·bits/32, groups),
  packed along `out`.
- `int-quantized`: `weight` int8 (out, in), each code less 128; `weight_scale` (out, 1).
- `float-quantized`: `weight` float8_e4m3fn (out, in); `weight_scale` (out, 1), or (1,) for the whole tensor.
- `mxfp4-pack-quantized`: `weight_packed` uint8 (out, in/2), two codes a byte, the first in the low half;
  `weight_scale` uint8 (out, in/32), exponents. `nvfp4-pack-quantized`: `weight_scale` float8_e4m3fn (out, in/16) and
  `weight_global_scale` float32 (1,), by which it is divided.

GPT-2 keeps its weights (in, out), so that a group runs down a column. There everything above is transposed, a group of
packed integers is a block of (group size, 1), and zero points are int8 less 2^(bits−1), which is how the library stores
those of blocks.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from models.files.safetensors_file import Entry, read
from models.formats.compressed_tensors_config import FLOATS, INTEGERS, MXFP4, NVFP4, PACKED, layout_name, scheme_of
from models.formats.packing import pack, unpack, words_for
from models.formats.shards import Piece, Shape
from models.weights.codes import Codes, Encoded
from models.weights.float_codes import Float4Codes, Float8Codes
from models.weights.quantized import QuantizedModel, Site

Read = Callable[[str], Tensor]


def piece_of(quantized: QuantizedModel, site: Site) -> Piece:
    """The tensors of a linear, to be written when their turn comes."""
    layout = layout_name(quantized.schemes[site.name])
    shapes = {f"{site.name}.{part}": shape for part, shape in SHAPES[layout](quantized, site).items()}

    def make() -> dict[str, Tensor]:
        parts = MAKERS[layout](quantized.codes(site.name), quantized.dtype, site.transposed)
        return {f"{site.name}.{part}": tensor for part, tensor in parts.items()}

    return Piece(shapes, make)


def restore(tensor: Read, entry: Mapping[str, Any]) -> Encoded:
    """The codes of a linear. tensor: reads one of its parts. entry: its group in the written config."""
    return READERS[entry["format"]](tensor, entry)


def weights_in(name: str, entries: Mapping[str, Entry]) -> int | None:
    """How many weights a tensor of a written directory stands for; None where it is no linear's stored weight."""
    module, _, part = name.rpartition(".")
    entry = entries[name]
    if part == "weight_packed":
        shape = entries.get(f"{module}.weight_shape")  # blocks of four-bit floats need none: two a byte
        return math.prod(read(shape).tolist()) if shape is not None else 2 * math.prod(entry.shape)
    if part == "weight" and entry.dtype in (torch.int8, torch.float8_e4m3fn):
        return math.prod(entry.shape)
    return None


def _packed_shapes(quantized: QuantizedModel, site: Site) -> dict[str, Shape]:
    scheme = quantized.schemes[site.name]
    groups = site.columns // scheme.columns(site.columns)
    outer, inner = (site.columns, site.rows) if site.transposed else (site.rows, site.columns)
    shapes: dict[str, Shape] = {
        "weight_packed": (torch.int32, (outer, words_for(inner, scheme.bits))),
        "weight_scale": (quantized.dtype, (groups, site.rows) if site.transposed else (site.rows, groups)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        packed = (torch.int32, (words_for(site.rows, scheme.bits), groups))
        shapes["weight_zero_point"] = (torch.int8, (groups, site.rows)) if site.transposed else packed
    return shapes


def _packed_parts(encoded: Encoded, dtype: torch.dtype, transposed: bool) -> dict[str, Tensor]:
    codes = cast(Codes, encoded)
    stored, scale = (codes.codes.t(), codes.scale.t()) if transposed else (codes.codes, codes.scale)
    parts = {
        "weight_packed": pack(stored, codes.bits),
        "weight_scale": scale.to(dtype),
        "weight_shape": torch.tensor(stored.shape),
    }
    if not codes.symmetric:
        middle = 2 ** (codes.bits - 1)
        parts["weight_zero_point"] = (
            (codes.zero.t().to(torch.int16) - middle).to(torch.int8)
            if transposed
            else pack(codes.zero.t(), codes.bits).t()
        )
    return parts


def _read_packed(tensor: Read, entry: Mapping[str, Any]) -> Encoded:
    weights = entry["weights"]
    bits, symmetric, transposed = weights["num_bits"], weights["symmetric"], weights["strategy"] == "block"
    rows, columns = tensor("weight_shape").tolist()
    codes, scale = unpack(tensor("weight_packed"), bits, columns), tensor("weight_scale").float()
    if symmetric:
        zero = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)
    elif transposed:
        zero = (tensor("weight_zero_point").to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    else:
        zero = unpack(tensor("weight_zero_point").t(), bits, rows).t()
    if transposed:
        codes, scale, zero = codes.t(), scale.t(), zero.t()
    scheme = scheme_of(entry, codes.shape[1], scale.shape[1])
    return Codes(codes.contiguous(), scale.contiguous(), zero.contiguous(), scheme)


def _integer_shapes(quantized: QuantizedModel, site: Site) -> dict[str, Shape]:
    return {"weight": (torch.int8, (site.rows, site.columns)), "weight_scale": (quantized.dtype, (site.rows, 1))}


def _integer_parts(encoded: Encoded, dtype: torch.dtype, transposed: bool) -> dict[str, Tensor]:  # noqa: ARG001
    codes = cast(Codes, encoded)
    return {"weight": (codes.codes ^ 0x80).view(torch.int8), "weight_scale": codes.scale.to(dtype)}


def _read_integers(tensor: Read, entry: Mapping[str, Any]) -> Encoded:
    codes, scale = tensor("weight").view(torch.uint8) ^ 0x80, tensor("weight_scale").float()
    zero = torch.full(scale.shape, 128, dtype=torch.uint8)
    return Codes(codes, scale, zero, scheme_of(entry, codes.shape[1], 1))


def _float8_shapes(quantized: QuantizedModel, site: Site) -> dict[str, Shape]:
    whole = quantized.schemes[site.name].group_size == "tensor"
    weight, scale = (site.rows, site.columns), (site.rows, 1)
    if site.transposed:
        weight, scale = weight[::-1], scale[::-1]
    return {"weight": (torch.float8_e4m3fn, weight), "weight_scale": (quantized.dtype, (1,) if whole else scale)}


def _float8_parts(encoded: Encoded, dtype: torch.dtype, transposed: bool) -> dict[str, Tensor]:
    codes = cast(Float8Codes, encoded)
    weight, scale = (codes.codes.t(), codes.scale.t()) if transposed else (codes.codes, codes.scale)
    if codes.scheme.group_size == "tensor":
        scale = scale.flatten()[:1]
    return {"weight": weight, "weight_scale": scale.to(dtype)}


def _read_float8(tensor: Read, entry: Mapping[str, Any]) -> Encoded:
    codes, scale = tensor("weight"), tensor("weight_scale").float()
    if scale.dim() == 2 and scale.shape[0] == 1 < scale.shape[1]:  # transposed
        codes, scale = codes.t().contiguous(), scale.t().contiguous()
    scale = scale.view(-1, 1).expand(codes.shape[0], 1).contiguous()
    return Float8Codes(codes, scale, scheme_of(entry, codes.shape[1], 1))


def _float4_shapes(quantized: QuantizedModel, site: Site) -> dict[str, Shape]:
    scheme = quantized.schemes[site.name]
    blocks = (site.rows, site.columns // scheme.columns(site.columns))
    packed: dict[str, Shape] = {"weight_packed": (torch.uint8, (site.rows, site.columns // 2))}
    if layout_name(scheme) == MXFP4:
        return packed | {"weight_scale": (torch.uint8, blocks)}
    return packed | {"weight_scale": (torch.float8_e4m3fn, blocks), "weight_global_scale": (torch.float32, (1,))}


def _float4_parts(encoded: Encoded, dtype: torch.dtype, transposed: bool) -> dict[str, Tensor]:  # noqa: ARG001
    codes = cast(Float4Codes, encoded)
    parts = {"weight_packed": codes.codes[:, ::2] | codes.codes[:, 1::2] << 4, "weight_scale": codes.scale}
    if layout_name(codes.scheme) == NVFP4:
        parts["weight_global_scale"] = codes.divisor
    return parts


def _read_float4(tensor: Read, entry: Mapping[str, Any]) -> Encoded:
    packed, scale = tensor("weight_packed"), tensor("weight_scale")
    codes = torch.stack((packed & 0x0F, packed >> 4), dim=-1).view(len(packed), -1)
    divisor = tensor("weight_global_scale") if entry["format"] == NVFP4 else torch.ones(1)
    return Float4Codes(codes, scale, divisor, scheme_of(entry, codes.shape[1], scale.shape[1]))


SHAPES: dict[str, Callable[[QuantizedModel, Site], dict[str, Shape]]] = {
    PACKED: _packed_shapes,
    INTEGERS: _integer_shapes,
    FLOATS: _float8_shapes,
    MXFP4: _float4_shapes,
    NVFP4: _float4_shapes,
}
MAKERS: dict[str, Callable[[Encoded, torch.dtype, bool], dict[str, Tensor]]] = {
    PACKED: _packed_parts,
    INTEGERS: _integer_parts,
    FLOATS: _float8_parts,
    MXFP4: _float4_parts,
    NVFP4: _float4_parts,
}
READERS: dict[str, Callable[[Read, Mapping[str, Any]], Encoded]] = {
    PACKED: _read_packed,
    INTEGERS: _read_integers,
    FLOATS: _read_float8,
    MXFP4: _read_float4,
    NVFP4: _read_float4,
}
