"""Rounds a tiny model to nearest, in the plainest way, so that formats have codes to hold before any method runs."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.checkpoint import SourceModel, open_model
from models.codes import Codes
from models.formats.directory import skeleton_of
from models.quantized import QuantizedModel, Site, block_file, tensors_of
from squeeze.steps import RTN, GroupSize


def rounded(
    model: Path,
    work: Path,
    *,
    bits: int = 4,
    group_size: GroupSize = 64,
    symmetric: bool = True,
    ignored: tuple[str, ...] = (),
) -> tuple[SourceModel, QuantizedModel]:
    """Every linear of the decoder blocks but the `ignored` ones, under `work` as the engine would leave it."""
    source = open_model(model)
    blocks_path = source.row.blocks
    step = RTN.model_validate({"method": "rtn", "bits": bits, "group_size": group_size, "symmetric": symmetric})
    transposed = source.config["model_type"] == "gpt2"
    sites: dict[str, Site] = {}
    blocks: dict[int, dict[str, Codes]] = {}
    for name in skeleton_of(source).linears:
        if not name.startswith(f"{blocks_path}.") or name in ignored:
            continue
        weight = source.tensor(source.module_key(name, "weight")).float()
        weight = weight.t() if transposed else weight
        rows, columns = weight.shape
        sites[name] = Site(name, rows, columns, transposed)
        index = int(name.removeprefix(f"{blocks_path}.").split(".")[0])
        size = columns if group_size == "channel" else group_size
        blocks.setdefault(index, {})[name] = nearest(weight, bits, size, symmetric)
    work.mkdir(parents=True, exist_ok=True)
    for index, block in blocks.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors_of(block)}, block_file(work, index))
    return source, QuantizedModel(work, step, sites, ignored, source.dtype)


def nearest(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> Codes:
    """weight: (out, in). Scales fit bfloat16 and float16, zero points are at least 1."""
    rows, columns = weight.shape
    top = 2**bits - 1
    groups = weight.reshape(rows, -1, group_size)
    high, low = groups.amax(-1).clamp(min=1e-3), groups.amin(-1).clamp(max=-1e-3)
    if symmetric:
        scale = torch.maximum(high, -low) / (top / 2)
        zero = torch.full_like(scale, 2.0 ** (bits - 1))
    else:
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(1, top)
    scale = scale.bfloat16().float()
    codes = (groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, top)
    return Codes(codes.view(rows, columns).byte(), scale, zero.byte(), bits, group_size, symmetric)


def dequantized(model: Path, quantized: QuantizedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The plain model with every quantized weight replaced by what its codes stand for."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with torch.no_grad():
        for name, site in quantized.sites.items():
            weight = quantized.codes(name).dequantize(dtype)
            plain.get_submodule(name).weight.copy_(weight.t() if site.transposed else weight)
    return plain
