"""LoRA (arXiv 2106.09685), with rsLoRA, DoRA and PiSSA: which layers get an adapter, how it is written and merged.

peft makes and runs the adapters, so that what is trained is what its users load.
"""

import fnmatch
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models.formats.directory import write_json
from models.frame import Frame
from models.quantized import Site
from models.safetensors_file import read, read_header
from squeeze.errors import ModelMalformed
from squeeze.training import LoRA

PREFIX = "base_model.model."  # of the names in peft's files
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def sites_of(frame: Frame, step: LoRA) -> list[Site]:
    """The layers that get an adapter, in the model's order; raises ModelMalformed where there are none of a pattern."""
    experts = {name for n in range(frame.count) for linears in frame.experts(n).values() for name in linears}
    able = [site for n in range(frame.count) for site in frame.sites(n) if site.name not in experts]
    for pattern in step.target_modules:
        if not any(fnmatch.fnmatchcase(site.name, pattern) for site in able):
            raise ModelMalformed(
                f"the pattern {pattern!r} matches no linear layer of the decoder blocks; their names are like "
                f"{able[0].name if able else 'none at all'}",
                param="target_modules",
            )
    wanted = step.target_modules or ("*",)
    return [site for site in able if any(fnmatch.fnmatchcase(site.name, pattern) for pattern in wanted)]


def finetune(model: Any, step: LoRA, names: Sequence[str]) -> Any:
    """The model with an adapter beside each of the named linears, in float32; nothing else of it learns.

    With init `pissa` the model's own weights give their largest singular vectors to the adapters.
    """
    config = LoraConfig(
        r=step.rank,
        lora_alpha=step.alpha,
        lora_dropout=step.dropout,
        use_rslora=step.rslora,
        use_dora=step.dora,
        init_lora_weights="pissa" if step.init == "pissa" else True,
        target_modules=_short(model, names),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 by a name that is to go
        return get_peft_model(model, config)


def adapter_of(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors by their names in peft's files, on the CPU, in memory of their own."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def write(model: Any, step: LoRA, initial: Mapping[str, Tensor], out: Path, base: str, revision: str | None) -> None:
    """Writes the adapter in peft's layout into a directory. initial: it as it began. base: what the config calls the
    model that it goes with.

    One that began at singular vectors is written as what it became less what it was, side by side in twice the rank, so
    that it goes with the model's own weights (as peft's `path_initial_model_for_weight_conversion`).
    """
    tensors, config = adapter_of(model), model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base, "revision": revision, "inference_mode": True, "init_lora_weights": True}
    if step.init == "pissa":
        for name, tensor in tensors.items():
            ends = [tensor, -initial[name] if ".lora_B." in name else initial[name]]
            tensors[name] = torch.cat(ends, dim=1 if ".lora_B." in name else 0)
        config["r"] = 2 * step.rank
        config["lora_alpha"] = step.alpha * (math.sqrt(2) if step.rslora else 2)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    write_json(out / CONFIG, plain)


class Merged:
    """The weights of a model with what an adapter's directory adds to them."""

    def __init__(self, adapter: Path) -> None:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        self._scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        self._entries = {name.removeprefix(PREFIX): entry for name, entry in read_header(adapter / WEIGHTS).items()}

    @property
    def modules(self) -> list[str]:
        """Names of the layers with an adapter."""
        return [name.removesuffix(".lora_A.weight") for name in self._entries if name.endswith(".lora_A.weight")]

    def weight(self, module: str, W: Tensor, *, transposed: bool) -> Tensor:
        """W + scale·B·A, float32, in the layout of W. W: (out, in), or (in, out) where transposed.

        With DoRA each row then gets the length that was learned (arXiv 2402.09353, equation 5).
        """
        A, B = (self._read(f"{module}.lora_{letter}.weight") for letter in "AB")
        V = W.t() if transposed else W
        V = V.float() + self._scale * (B @ A)  # (out, in)
        if f"{module}.lora_magnitude_vector" in self._entries:
            m = self._read(f"{module}.lora_magnitude_vector")  # (out,)
            V = V * (m / torch.linalg.norm(V, dim=1)).unsqueeze(1)
        merged: Tensor = V.t() if transposed else V
        return merged.contiguous()

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = read(self._entries[name])
        return tensor.float()


def _short(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Last names where they mean these layers and no others, else whole ones."""
    able = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    lasts = {name.rpartition(".")[2] for name in names}
    meant = {name for name in able if name.rpartition(".")[2] in lasts}
    return sorted(lasts if meant == set(names) else names)
