"""What all adapters share: the layers that get one, peft's model around the model, the directory in peft's layout.

peft makes and runs the adapters, so that what is trained is what its users load.
"""

import fnmatch
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models.files.safetensors_file import read, read_header
from models.formats.directory import write_json
from models.streaming.frame import Frame
from models.weights.quantized import Site
from squeeze.errors import ModelMalformed
from squeeze.shapes.adapters import CONFIG, PREFIX, WEIGHTS
from squeeze.steps.finetuning import Adapters


def chosen(frame: Frame, patterns: Sequence[str], usual: Callable[[Site], bool]) -> list[Site]:
    """The linears of the decoder blocks whose names match a pattern, in the model's order; where there is no pattern,
    the `usual` ones. Fused experts are never among them. Raises ModelMalformed for a pattern that matches none.
    """
    experts = {name for n in range(frame.count) for linears in frame.experts(n).values() for name in linears}
    able = [site for n in range(frame.count) for site in frame.sites(n) if site.name not in experts]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(site.name, pattern) for site in able):
            raise ModelMalformed(
                f"the pattern {pattern!r} matches no linear layer of the decoder blocks; their names are like "
                f"{able[0].name if able else 'none at all'}",
                param="target_modules",
            )
    if not patterns:
        return [site for site in able if usual(site)]
    return [site for site in able if any(fnmatch.fnmatchcase(site.name, pattern) for pattern in patterns)]


def short(model: nn.Module, names: Sequence[str]) -> list[str]:
    """How peft is told of linears: by their last names where these mean them and no others, else by whole ones."""
    lasts = {last(name) for name in names}
    meant = {name for name, _ in model.named_modules() if last(name) in lasts}
    return sorted(lasts if meant == set(names) else names)


def last(name: str) -> str:
    """`q_proj` of `model.layers.0.self_attn.q_proj`."""
    return name.rpartition(".")[2]


def transposed(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether linears keep their weights with the inputs first, as GPT-2 does."""
    return any(isinstance(model.get_submodule(name), Conv1D) for name in names)


def wrapped(model: Any, config: PeftConfig) -> Any:
    """The model with adapters, which learn, in float32; nothing else of it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 by a name that is to go
        learner = get_peft_model(model, config)
    for parameter in learner.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return learner


def adapter_of(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors by their names in peft's files, on the CPU, in memory of their own."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def write(
    model: Any,
    step: Adapters,  # noqa: ARG001 - the same whatever it says
    initial: Mapping[str, Tensor],  # noqa: ARG001 - only those that change the model's weights need it
    out: Path,
    base: str,
    revision: str | None,
) -> None:
    """Writes the adapter in peft's layout into a directory. initial: it as it began. base: what the settings call the
    model that it goes with.
    """
    write_adapter(model, adapter_of(model), {"base_model_name_or_path": base, "revision": revision}, out)


def write_adapter(model: Any, tensors: Mapping[str, Tensor], changes: Mapping[str, Any], out: Path) -> None:
    """Writes an adapter in peft's layout into a directory. changes: of the settings that it was made with."""
    config = model.peft_config["default"].to_dict() | {"inference_mode": True} | dict(changes)
    save_file(dict(tensors), out / WEIGHTS, metadata={"format": "pt"})
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    write_json(out / CONFIG, plain)


class Written:
    """An adapter's directory, which a method merges into weights in its own way.

    mark: what stands between the name of a layer and that of its part, in one of the files' names for each layer.
    """

    def __init__(self, adapter: Path, mark: str) -> None:
        self.config: dict[str, Any] = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        self._entries = {name.removeprefix(PREFIX): entry for name, entry in read_header(adapter / WEIGHTS).items()}
        self._mark = mark

    @property
    def modules(self) -> list[str]:
        """Names of the layers with an adapter."""
        return [name.removesuffix(self._mark) for name in self._entries if name.endswith(self._mark)]

    def bias(self, module: str, b: Tensor) -> Tensor:  # noqa: ARG002 - for methods that change it
        """The bias of a layer with what was learned in it, float32. b: (out,)."""
        return b.float()

    def has(self, name: str) -> bool:
        return name in self._entries

    def tensor(self, name: str) -> Tensor:
        """One of the adapter's, float32."""
        found: Tensor = read(self._entries[name])
        return found.to(torch.float32)
