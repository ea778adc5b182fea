"""What transformers' `save_pretrained` makes of a bitsandbytes model, in 4 bits (nf4) or 8 (LLM.int8()).

A linear in nf4 has `weight` uint8 (out·in/2, 1), two codes a byte, the first in the upper half; `weight.absmax`, the
scales of blocks of 64; `weight.quant_map` float32 (16,); and `weight.quant_state.bitsandbytes__nf4`, the rest as JSON.
Nested scales are uint8, beside `weight.nested_absmax` float32 and `weight.nested_quant_map` float32 (256,).

In 8 bits it has `weight` int8 (out, in), `SCB` float32 (out,), each row's largest magnitude, and `weight_format`.

Weights are (out, in), in GPT-2 too, whose layers the library replaces by linears.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from models.files.checkpoint import SourceModel, tensor_entries
from models.files.safetensors_file import read as read_tensor
from models.formats.directory import pieces_of, skeleton_of, write_companions, write_config, written_whole
from models.formats.shards import SHARD_BYTES, Piece, Shape, write_shards
from models.progress import Notify
from models.streaming.activations import OUTLIER
from models.weights.codes import Codes, Encoded
from models.weights.normal_float import BLOCK, NESTED_BLOCK, NF4, NormalFloat, dynamic_map
from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import FormatUnfit
from squeeze.steps.schemes import Scheme

LARGEST, ZERO = 127, 128  # of int8, and what stands for 0 in codes without a sign
KERNEL_ROWS = 32
STATE = "weight.quant_state.bitsandbytes__nf4"


def refuse(sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
    """Raises FormatUnfit where bitsandbytes could not compute one of these layers.

    Blocks of nf4 may reach over the end of a row, and GPUs compute such layers. bitsandbytes 0.50 for CPUs with
    AVX512-BF16 wants whole blocks in a row and outputs in 32s, and fails at the first forward pass.
    """
    for site in sites:
        if schemes[site.name].element == "nf4" and (site.columns % BLOCK or site.rows % KERNEL_ROWS):
            raise FormatUnfit(
                f"bitsandbytes computes nf4 layers on CPUs only with inputs in {BLOCK}s and outputs in {KERNEL_ROWS}s; "
                f"{site.name} has {site.columns} and {site.rows}: name it in `ignore`, or take `int8`",
                param="ignore",
            )


def write(
    source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` loads where bitsandbytes is installed."""
    refuse(quantized.sites.values(), quantized.schemes)
    skeleton = skeleton_of(source)
    skipped = [name for name in skeleton.linears if name not in quantized.sites]

    def site_piece(site: Site) -> Piece:
        return (_nf4_piece if quantized.schemes[site.name].element == "nf4" else _int8_piece)(quantized, site)

    with written_whole(out) as partial:
        write_companions(source, partial)
        write_config(source, quantized, _config(quantized, skipped), partial)
        write_shards(partial, pieces_of(source, skeleton, quantized, site_piece), notify, shard_bytes)


def read(out: Path, module: str) -> Encoded:
    """The codes of one layer, from what `write` wrote."""
    entries = tensor_entries(out)

    def tensor(part: str) -> Tensor:
        return read_tensor(entries[f"{module}.{part}"])

    if f"{module}.{STATE}" not in entries:
        scale = (tensor("SCB") / LARGEST).unsqueeze(-1)
        codes = (tensor("weight").to(torch.int16) + ZERO).to(torch.uint8)
        zero = torch.full(scale.shape, ZERO, dtype=torch.uint8)
        return Codes(codes, scale, zero, Scheme("int", 8, "channel", activations="llm-int8"))
    state = json.loads(bytes(tensor(STATE).tolist()))
    packed, nested = tensor("weight").view(-1), "nested_offset" in state
    return NormalFloat(
        torch.stack([packed >> 4, packed & 15], dim=-1).view(state["shape"]),
        tensor("weight.absmax"),
        Scheme("nf4", 4, BLOCK, nested=nested),
        tensor("weight.nested_absmax") if nested else None,
        torch.tensor([state["nested_offset"]]) if nested else None,
    )


def _config(quantized: QuantizedModel, skipped: list[str]) -> dict[str, Any]:
    """The library's own description."""
    scheme = next(iter(quantized.schemes.values()))
    kind = (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": scheme.nested,
            "bnb_4bit_compute_dtype": quantized.dtype,
        }
        if scheme.element == "nf4"
        else {"load_in_8bit": True, "llm_int8_threshold": OUTLIER}
    )
    config: dict[str, Any] = BitsAndBytesConfig(llm_int8_skip_modules=skipped, **kind).to_dict()
    return config


def _nf4_piece(quantized: QuantizedModel, site: Site) -> Piece:
    nested, weights = quantized.schemes[site.name].nested, site.rows * site.columns
    blocks = -(-weights // BLOCK)
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(quantized.dtype).removeprefix("torch."),
        "shape": [site.rows, site.columns],
    }
    shapes: dict[str, Shape] = {
        "weight": (torch.uint8, (-(-weights // 2), 1)),
        "weight.absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
        "weight.quant_map": (torch.float32, (len(NF4),)),
    }
    if nested:
        offset = float(quantized.part(site.name, "offset"))
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        shapes["weight.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
        shapes["weight.nested_quant_map"] = (torch.float32, tuple(dynamic_map().shape))
    told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    shapes[STATE] = (torch.uint8, tuple(told.shape))

    def make() -> dict[str, Tensor]:
        encoded = cast(NormalFloat, quantized.codes(site.name))
        codes = torch.nn.functional.pad(encoded.codes.view(-1), (0, weights % 2)).view(-1, 2)
        made = {
            "weight": (codes[:, :1] << 4) | codes[:, 1:],
            "weight.absmax": encoded.absmax,
            "weight.quant_map": torch.tensor(NF4),
            STATE: told,
        }
        if encoded.nested_absmax is not None:
            made |= {"weight.nested_absmax": encoded.nested_absmax, "weight.nested_quant_map": dynamic_map()}
        return {f"{site.name}.{part}": tensor for part, tensor in made.items()}

    return Piece({f"{site.name}.{part}": shape for part, shape in shapes.items()}, make)


def _int8_piece(quantized: QuantizedModel, site: Site) -> Piece:
    name = site.name
    shapes: dict[str, Shape] = {
        f"{name}.weight": (torch.int8, (site.rows, site.columns)),
        f"{name}.SCB": (torch.float32, (site.rows,)),
        f"{name}.weight_format": (torch.uint8, ()),
    }

    def make() -> dict[str, Tensor]:
        codes = cast(Codes, quantized.codes(name))
        return {
            f"{name}.weight": (codes.codes.to(torch.int16) - ZERO).to(torch.int8),
            f"{name}.SCB": codes.scale.view(-1) * LARGEST,
            f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),  # rows one by one
        }

    return Piece(shapes, make)
