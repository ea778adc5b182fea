"""A base, two models that were finetuned from it, two adapters of it, and the job that merges them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from models.job import Inputs, Named
from squeeze.specs.job_spec import JobSpec
from tests.models import tiny
from tests.models.job_parts import inputs_of

BASE = "org/model"
LINEARS = ("self_attn.q_proj", "mlp.down_proj")


def base_model(directory: Path, family: str = "llama") -> Path:
    return tiny.FAMILIES[family](directory, dtype=torch.bfloat16)


def finetuned(base: Path, directory: Path, seed: int, share: float = 0.5, **settings: Any) -> Path:
    """The base with some elements of each tensor moved."""
    dice = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True)
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    for file in base.glob("*.safetensors"):
        tensors = {name: _moved(tensor, share, dice) for name, tensor in load_file(file).items()}
        save_file(tensors, directory / file.name, metadata={"format": "pt"})
    if settings:
        config = json.loads((directory / "config.json").read_text()) | settings
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def _moved(tensor: torch.Tensor, share: float, dice: torch.Generator) -> torch.Tensor:
    noise = 0.02 * torch.randn(tensor.shape, generator=dice)
    moves = torch.rand(tensor.shape, generator=dice) < share
    return (tensor.float() + noise * moves).to(tensor.dtype)


def adapter(
    directory: Path, seed: int, *, base: str = BASE, rank: int = 4, width: int = tiny.HIDDEN, **settings: Any
) -> Path:
    """A LoRA adapter of some linears of the tiny Llama, in peft's layout."""
    dice = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True)
    sizes = {"self_attn.q_proj": (tiny.HIDDEN, width), "mlp.down_proj": (tiny.HIDDEN, tiny.INTERMEDIATE)}
    tensors = {}
    for layer in range(tiny.LAYERS):
        for name in LINEARS:
            rows, columns = sizes[name]
            whole = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{whole}.lora_A.weight"] = torch.randn(rank, columns, generator=dice) / 8
            tensors[f"{whole}.lora_B.weight"] = torch.randn(rows, rank, generator=dice) / 8
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config | settings))
    return directory


def spec_of(step: dict[str, Any], entries: list[Path], **changes: Any) -> JobSpec:
    names = [{"model": f"org/{path.name}"} for path in entries]
    steps = [{"kind": "merge", "method": "linear", "models": names} | step]
    sizes: dict[str, Any] = {"data": {"samples": 4, "sequence_length": 64}, "evaluation": {"samples": 2}}
    return JobSpec.model_validate({"model": BASE, "steps": steps} | sizes | changes)


def merging_inputs(spec: JobSpec, base: Path, entries: list[Path], room: Path) -> Inputs:
    named = tuple(Named(path, f"org/{path.name}", "0123abc") for path in entries)
    return dataclasses.replace(inputs_of(spec, base, None, room), merged=named)
