"""Rounds a tiny model to nearest, in the plainest way, so that formats have codes to hold before any method runs."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.files.checkpoint import SourceModel, open_model
from models.streaming.frame import Frame
from models.weights.codes import Codes
from models.weights.quantized import QuantizedModel, Site, block_file, tensors_of
from squeeze.steps.quantization import RTN, GroupSize
from squeeze.steps.schemes import Scheme


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
    frame = Frame(source, torch.float32, torch.device("cpu"))
    step = RTN.model_validate({"method": "rtn", "bits": bits, "group_size": group_size, "symmetric": symmetric})
    sites: dict[str, Site] = {}
    blocks: dict[int, dict[str, Codes]] = {}
    for index, site in ((n, site) for n in range(frame.count) for site in frame.sites(n)):
        name, columns = site.name, site.columns
        if name in ignored:
            continue
        sites[name] = site
        weight = source.tensor(source.module_key(name, "weight")).float()
        weight = weight.t() if site.transposed else weight
        size = columns if group_size == "channel" else group_size
        blocks.setdefault(index, {})[name] = nearest(weight, bits, size, symmetric)
    work.mkdir(parents=True, exist_ok=True)
    for index, block in blocks.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors_of(block)}, block_file(work, index))
    return source, QuantizedModel(work, step, sites, dict.fromkeys(sites, step.scheme()), ignored, source.dtype)


def nearest(weight: torch.Tensor, bits: int, group_size: int, symmetric: bool) -> Codes:
    """weight: (out, in). Scales fit bfloat16 and float16, zero points are at least 1. As ours do, a symmetric grid of
    few bits runs downwards where a group's largest weight is positive.
    """
    rows, columns = weight.shape
    top = 2**bits - 1
    groups = weight.reshape(rows, -1, group_size)
    high, low = groups.amax(-1).clamp(min=1e-3), groups.amin(-1).clamp(max=-1e-3)
    if symmetric:
        scale = torch.maximum(high, -low) / (top / 2)
        scale = torch.where((high > -low) & (bits < 8), -scale, scale)
        zero = torch.full_like(scale, 2.0 ** (bits - 1))
    else:
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(1, top)
    scale = scale.bfloat16().float()
    codes = (groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, top)
    return Codes(
        codes.view(rows, columns).byte(),
        scale,
        zero.byte(),
        Scheme("int", bits, "channel" if group_size == columns else group_size, symmetric),
    )


def dequantized(model: Path, quantized: QuantizedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The plain model with every quantized weight replaced by what its codes stand for."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with torch.no_grad():
        for name, site in quantized.sites.items():
            place(plain, site, quantized.codes(name).dequantize(dtype))
    return plain


def place(plain: PreTrainedModel, site: Site, weight: torch.Tensor) -> None:
    """Puts a weight (out, in) where a model has it that transformers made: experts are parts of one parameter there."""
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", site.name)
    with torch.no_grad():
        if match is None:
            plain.get_submodule(site.name).weight.copy_(weight.t() if site.transposed else weight)
            return
        experts = plain.get_submodule(match[1].replace("block_sparse_moe", "mlp"))
        if match[3] in ("down_proj", "w2"):
            experts.down_proj[int(match[2])].copy_(weight)
        else:
            both = experts.gate_up_proj[int(match[2])].chunk(2)
            both[match[3] in ("up_proj", "w3")].copy_(weight)
