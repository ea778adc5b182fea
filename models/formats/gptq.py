"""GPTQ's layout (`checkpoint_format: gptq`, version 1): gptqmodel, transformers (through optimum) and vLLM load it.

A linear has `qweight` int32 (in·bits/32, out), codes packed along `in`; `qzeros` int32 (groups, out·bits/32), each zero
point less one, packed along `out`; `scales` float16 (groups, out); `g_idx` int32 (in,), the group of each input.

Readers add the one back to whole words. A zero point of 0 would stand as all ones, the addition would carry into the
neighbour, and the file would be read wrong without a word: zero points must be at least 1.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel, read_config, tensor_entries
from models.files.safetensors_file import read as read_tensor
from models.formats.directory import pieces_of, skeleton_of, write_companions, write_config, write_json, written_whole
from models.formats.fitness import fused_names, refuse_torn_groups, refuse_torn_words, torn_fusions
from models.formats.packing import pack, unpack, words_for
from models.formats.shards import SHARD_BYTES, Piece, write_shards
from models.progress import Notify
from models.weights.codes import Codes
from models.weights.quantized import QuantizedModel, Site
from squeeze import __version__
from squeeze.errors import FormatUnfit
from squeeze.steps.schemes import Scheme

WHOLE_ROW = -1  # what group_size says for one scale a row


def refuse(sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
    """Raises FormatUnfit or GroupSizeIndivisible where this format can't hold one of these layers.

    GPT-2 is refused: transformers 5.23 draws fresh values for the weight of every `c_proj` before it loads, whatever
    stands there, and gptqmodel's layers have none to draw ("has no attribute 'normal_'").
    """
    sites = list(sites)
    for site in sites:
        if site.transposed:
            raise FormatUnfit(
                f"{site.name} keeps its weight transposed (Conv1D), and transformers can't load such layers from gptq; "
                "ask for compressed-tensors, which can hold them",
                param="formats",
            )
    refuse_torn_groups(sites, schemes)
    if len({schemes[site.name].bits for site in sites}) > 1:
        # vLLM and gptqmodel take `dynamic`; optimum, through which transformers loads, knows one number of bits.
        raise FormatUnfit(
            "transformers can't load layers of several numbers of bits from gptq; compressed-tensors can hold them",
            param="formats",
        )
    for site in sites:
        refuse_torn_words(site, schemes[site.name], "gptq")


def write(
    source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a directory that gptqmodel, transformers with optimum and gptqmodel, and vLLM load as it is."""
    refuse(quantized.sites.values(), quantized.schemes)
    for fusion in torn_fusions(quantized.sites, quantized.ignored):
        notify.event("warning", f"vLLM will not load the result: it fuses {fusion}, of which only a part is quantized")

    def site_piece(site: Site) -> Piece:
        return _piece(quantized, site)

    with written_whole(out) as partial:
        write_companions(source, partial)
        config = _config(quantized)
        write_config(source, quantized, config, partial)
        write_json(partial / "quantize_config.json", config)
        write_shards(partial, pieces_of(source, skeleton_of(source), quantized, site_piece), notify, shard_bytes)


def read(out: Path, module: str) -> Codes:
    """The codes of one layer, from what `write` wrote."""
    entries, config = tensor_entries(out), read_config(out)["quantization_config"]
    bits = config["bits"]

    def tensor(part: str) -> Tensor:
        return read_tensor(entries[f"{module}.{part}"])

    columns = len(tensor("g_idx"))
    scale = tensor("scales").t().contiguous().float()  # (out, groups)
    rows = len(scale)
    codes = unpack(tensor("qweight").t(), bits, columns)
    zero = unpack(tensor("qzeros"), bits, rows).t().contiguous() + 1
    group = config["group_size"]
    return Codes(codes, scale, zero, Scheme("int", bits, "channel" if group == WHOLE_ROW else group, config["sym"]))


def _config(quantized: QuantizedModel) -> dict[str, Any]:
    """Settings for every reader: gptqmodel and vLLM take `dynamic`, optimum takes `modules_in_block_to_quantize`."""
    step, scheme = quantized.step, next(iter(quantized.schemes.values()))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": WHOLE_ROW if scheme.group_size == "channel" else scheme.group_size,
        "sym": scheme.symmetric,
        # Groups are of neighbouring columns, in whatever order these were rounded.
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"squeeze:{__version__}"], "method": step.method},
    }
    if scheme.bits == 4 and scheme.group_size == "channel" and not scheme.symmetric:
        # On a CPU gptqmodel 7.6 would choose a kernel that takes every zero point for 8 (`TorchFusedLinear`).
        config["backend"] = "torch"
    if quantized.ignored:
        left = [*quantized.ignored, *fused_names(quantized.ignored)]
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
        config["modules_in_block_to_quantize"] = [list(quantized.sites)]
    return config


def _piece(quantized: QuantizedModel, site: Site) -> Piece:
    scheme = quantized.schemes[site.name]
    group_size = scheme.columns(site.columns)
    groups = site.columns // group_size
    shapes = {
        f"{site.name}.qweight": (torch.int32, (words_for(site.columns, scheme.bits), site.rows)),
        f"{site.name}.qzeros": (torch.int32, (groups, words_for(site.rows, scheme.bits))),
        f"{site.name}.scales": (torch.float16, (groups, site.rows)),
        f"{site.name}.g_idx": (torch.int32, (site.columns,)),
    }

    def make() -> dict[str, Tensor]:
        codes = cast(Codes, quantized.codes(site.name))
        if int(codes.zero.min()) < 1:
            raise FormatUnfit(
                f"{site.name} has a zero point of 0, which gptq can't hold; the least is 1", param="formats"
            )
        return {
            f"{site.name}.qweight": pack(codes.codes, scheme.bits).t(),
            f"{site.name}.qzeros": pack(codes.zero.t() - 1, scheme.bits),
            f"{site.name}.scales": codes.scale.to(torch.float16).t(),
            f"{site.name}.g_idx": torch.arange(site.columns, dtype=torch.int32) // group_size,
        }

    return Piece(shapes, make)
