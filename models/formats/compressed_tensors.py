"""compressed-tensors, `pack-quantized`: what transformers and vLLM load.

A linear has `weight_packed` int32 (out, in·bits/32), codes packed along `in`; `weight_scale` (out, groups) in the
model's dtype; `weight_shape` int64 (2,); and when asymmetric `weight_zero_point` int32 (out·bits/32, groups), packed
along `out`.

GPT-2 keeps its weights (in, out), so that a group runs down a column. There everything above is transposed, a group is
a block of (group size, 1), and zero points are int8 less 2^(bits−1), which is how the library stores those of blocks.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from models.checkpoint import SourceModel, read_config, tensor_entries
from models.codes import Codes
from models.formats.directory import pieces_of, skeleton_of, write_companions, write_config, written_whole
from models.formats.fitness import refuse_torn_groups, torn_fusions
from models.formats.packing import pack, unpack, words_for
from models.formats.shards import SHARD_BYTES, Piece, Shape, write_shards
from models.progress import Notify
from models.quantized import QuantizedModel, Site, group_columns
from models.safetensors_file import read as read_tensor
from squeeze.steps import Quantize


def refuse(sites: Iterable[Site], step: Quantize) -> None:
    """Raises GroupSizeIndivisible where this format can't hold one of these layers."""
    refuse_torn_groups(list(sites), step)


def write(
    source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` and vLLM load as it is."""
    sites = quantized.sites
    refuse(sites.values(), quantized.step)
    if any(site.transposed for site in sites.values()):
        notify.event("warning", "vLLM will not load the result: it knows no transposed layers in compressed-tensors")
    for fusion in torn_fusions(sites, quantized.ignored):
        notify.event("warning", f"vLLM will not load the result: it fuses {fusion}, of which only a part is quantized")
    skeleton = skeleton_of(source)
    ignore = [name for name in skeleton.linears if name not in sites]
    if source.row.head_alias and "lm_head" in ignore:
        ignore.append(source.row.head_alias)  # vLLM goes by the name in the files

    def site_piece(site: Site) -> Piece:
        return _transposed_piece(quantized, site) if site.transposed else _piece(quantized, site)

    with written_whole(out) as partial:
        write_companions(source, partial)
        write_config(source, quantized, _config(quantized, ignore), partial)
        write_shards(partial, pieces_of(source, skeleton, sites, site_piece), notify, shard_bytes)


def read(out: Path, module: str) -> Codes:
    """The codes of one layer, from what `write` wrote."""
    entries = tensor_entries(out)
    weights = read_config(out)["quantization_config"]["config_groups"]["group_0"]["weights"]
    bits, symmetric, transposed = weights["num_bits"], weights["symmetric"], weights["strategy"] == "block"

    def tensor(part: str) -> Tensor:
        return read_tensor(entries[f"{module}.{part}"])

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
    return Codes(
        codes.contiguous(),
        scale.contiguous(),
        zero.contiguous(),
        bits,
        group_size=codes.shape[1] // scale.shape[1],
        symmetric=symmetric,
    )


def _config(quantized: QuantizedModel, ignore: list[str]) -> dict[str, Any]:
    """The library's own description; it validates what it is given."""
    step = quantized.step
    transposed = any(site.transposed for site in quantized.sites.values())
    group: dict[str, Any]
    if transposed:
        longest = max(group_columns(step, site) for site in quantized.sites.values())
        group = {"strategy": "block", "block_structure": [longest, 1]}  # a block may reach past a shorter layer's end
    elif step.group_size == "channel":
        group = {"strategy": "channel"}
    else:
        group = {"strategy": "group", "group_size": step.group_size}
    weights = {"num_bits": step.bits, "type": "int", "symmetric": step.symmetric, **group}
    targets = ["Conv1D" if transposed else "Linear"]
    config = QuantizationConfig.model_validate(
        {
            "config_groups": {"group_0": {"targets": targets, "format": "pack-quantized", "weights": weights}},
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ignore,
        }
    )
    plain: dict[str, Any] = json.loads(config.model_dump_json())
    if transposed or not step.symmetric:
        # transformers 5.23 can't keep these packed (zero points: "MISMATCH"; blocks: Conv1D is no Linear), but reads
        # them rightly when told to unpack while loading, which it would do at the first forward pass anyway.
        plain["dequantize"] = True
    return plain


def _piece(quantized: QuantizedModel, site: Site) -> Piece:
    step = quantized.step
    groups = site.columns // group_columns(step, site)
    shapes: dict[str, Shape] = {
        f"{site.name}.weight_packed": (torch.int32, (site.rows, words_for(site.columns, step.bits))),
        f"{site.name}.weight_scale": (quantized.dtype, (site.rows, groups)),
        f"{site.name}.weight_shape": (torch.int64, (2,)),
    }
    if not step.symmetric:
        shapes[f"{site.name}.weight_zero_point"] = (torch.int32, (words_for(site.rows, step.bits), groups))

    def make() -> dict[str, Tensor]:
        codes = quantized.codes(site.name)
        made = {
            f"{site.name}.weight_packed": pack(codes.codes, step.bits),
            f"{site.name}.weight_scale": codes.scale.to(quantized.dtype),
            f"{site.name}.weight_shape": torch.tensor([site.rows, site.columns]),
        }
        if not step.symmetric:
            made[f"{site.name}.weight_zero_point"] = pack(codes.zero.t(), step.bits).t()
        return made

    return Piece(shapes, make)


def _transposed_piece(quantized: QuantizedModel, site: Site) -> Piece:
    step = quantized.step
    groups = site.columns // group_columns(step, site)
    shapes: dict[str, Shape] = {
        f"{site.name}.weight_packed": (torch.int32, (site.columns, words_for(site.rows, step.bits))),
        f"{site.name}.weight_scale": (quantized.dtype, (groups, site.rows)),
        f"{site.name}.weight_shape": (torch.int64, (2,)),
    }
    if not step.symmetric:
        shapes[f"{site.name}.weight_zero_point"] = (torch.int8, (groups, site.rows))

    def make() -> dict[str, Tensor]:
        codes = quantized.codes(site.name)
        made = {
            f"{site.name}.weight_packed": pack(codes.codes.t(), step.bits),
            f"{site.name}.weight_scale": codes.scale.to(quantized.dtype).t(),
            f"{site.name}.weight_shape": torch.tensor([site.columns, site.rows]),
        }
        if not step.symmetric:
            made[f"{site.name}.weight_zero_point"] = (codes.zero.t().to(torch.int16) - 2 ** (step.bits - 1)).to(
                torch.int8
            )
        return made

    return Piece(shapes, make)
