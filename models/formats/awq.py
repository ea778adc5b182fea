"""AWQ's layout (`version: gemm`): transformers with gptqmodel, and vLLM, load it. Four bits, in groups.

One scale a row is not held: gptqmodel 7.6 chooses a kernel for it that refuses all but a few widths ("expect qGroupSize
to be 32, 64, 128 or 256").

A linear has `qweight` int32 (in, out/8) and `qzeros` int32 (groups, out/8), codes and zero points packed along `out`;
`scales` float16 (groups, out). The eight values of a word stand in the order of `ORDER`, the first lowest, and a zero
point stands as it is.

`zero_point` is true whatever the codes are: the layout stores zero points in any case, and vLLM takes a file that says
false for one without any, whose codes start at 0. Where all are 8, `meta` says so.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel, read_config, tensor_entries
from models.files.safetensors_file import read as read_tensor
from models.formats.directory import (
    Skeleton,
    pieces_of,
    skeleton_of,
    write_companions,
    write_config,
    written_whole,
)
from models.formats.fitness import refuse_torn_groups, torn_fusions
from models.formats.packing import pack, unpack
from models.formats.shards import SHARD_BYTES, Piece, Shape, write_shards
from models.progress import Notify
from models.weights.codes import Codes
from models.weights.quantized import QuantizedModel, Site
from squeeze import __version__
from squeeze.errors import FormatUnfit
from squeeze.steps.schemes import Scheme

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds the ORDER[i]-th of its eight columns


def refuse(sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
    """Raises FormatUnfit or GroupSizeIndivisible where this format can't hold one of these layers."""
    sites = list(sites)
    if len({schemes[site.name] for site in sites}) > 1:
        raise FormatUnfit("awq stores all layers alike; ask for compressed-tensors", param="formats")
    refuse_torn_groups(sites, schemes)
    for site in sites:
        if site.transposed:
            raise FormatUnfit(
                f"{site.name} keeps its weight transposed (Conv1D), which awq does not know; ask for "
                "compressed-tensors, which can hold such layers",
                param="formats",
            )
        for count, what in ((site.columns, "inputs"), (site.rows, "outputs")):
            if count % PER_WORD:
                raise FormatUnfit(
                    f"awq wants a layer's {what} to be a multiple of {PER_WORD}; {site.name} has {count}: name it in "
                    "`ignore`, or ask for compressed-tensors alone",
                    param="formats",
                )


def write(
    source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a directory that transformers with gptqmodel, and vLLM, load as it is."""
    refuse(quantized.sites.values(), quantized.schemes)
    for fusion in torn_fusions(quantized.sites, quantized.ignored):
        notify.event("warning", f"vLLM will not load the result: it fuses {fusion}, of which only a part is quantized")
    skeleton = skeleton_of(source)

    def site_piece(site: Site) -> Piece:
        return _piece(quantized, site)

    with written_whole(out) as partial:
        write_companions(source, partial)
        write_config(source, quantized, _config(quantized, skeleton), partial)
        write_shards(partial, pieces_of(source, skeleton, quantized, site_piece), notify, shard_bytes)


def read(out: Path, module: str) -> Codes:
    """The codes of one layer, from what `write` wrote."""
    entries, config = tensor_entries(out), read_config(out)["quantization_config"]

    def tensor(part: str) -> Tensor:
        return read_tensor(entries[f"{module}.{part}"])

    scale = tensor("scales").t().contiguous().float()  # (out, groups)
    scheme = Scheme("int", BITS, config["group_size"], config["meta"]["symmetric"])
    return Codes(
        _columns(tensor("qweight")).t().contiguous(), scale, _columns(tensor("qzeros")).t().contiguous(), scheme
    )


def _config(quantized: QuantizedModel, skeleton: Skeleton) -> dict[str, Any]:
    scheme = next(iter(quantized.schemes.values()))
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": [name for name in skeleton.linears if name not in quantized.sites],
        "meta": {
            "quantizer": [f"squeeze:{__version__}"],
            "method": quantized.step.method,
            "symmetric": scheme.symmetric,
        },
    }


def _piece(quantized: QuantizedModel, site: Site) -> Piece:
    groups = site.columns // quantized.schemes[site.name].columns(site.columns)
    words = site.rows // PER_WORD
    shapes: dict[str, Shape] = {
        f"{site.name}.qweight": (torch.int32, (site.columns, words)),
        f"{site.name}.qzeros": (torch.int32, (groups, words)),
        f"{site.name}.scales": (torch.float16, (groups, site.rows)),
    }

    def make() -> dict[str, Tensor]:
        codes = cast(Codes, quantized.codes(site.name))
        return {
            f"{site.name}.qweight": _words(codes.codes.t()),
            f"{site.name}.qzeros": _words(codes.zero.t()),
            f"{site.name}.scales": codes.scale.to(torch.float16).t(),
        }

    return Piece(shapes, make)


def _words(values: Tensor) -> Tensor:
    """values: (n, out) uint8 below 16. Returns (n, out/8) int32."""
    ordered = values.reshape(len(values), -1, PER_WORD)[:, :, list(ORDER)]
    return pack(ordered.reshape(len(values), -1), BITS)


def _columns(words: Tensor) -> Tensor:
    """The inverse of `_words`."""
    ordered = unpack(words, BITS, words.shape[1] * PER_WORD).view(len(words), -1, PER_WORD)
    return ordered[:, :, torch.tensor(ORDER).argsort()].reshape(len(words), -1)
