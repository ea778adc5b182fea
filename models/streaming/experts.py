"""Mixtures of experts, unfused: one linear a projection and expert, as files and other engines have them.

transformers 5 keeps the experts of a layer as two 3-D parameters, of which no part can be compressed for itself. Here
they are modules again, which compute the same function. Both layouts of files are read: a tensor for each expert, as
on the Hub, and the fused ones, whose parts lie one behind the other.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.files.architectures import Architecture
from models.files.safetensors_file import Entry
from squeeze.errors import FormatUnfit
from squeeze.steps.schemes import Scheme

FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")


class Projection(nn.Linear):
    """A linear that draws no weights: of tens of thousands, that alone would take many seconds."""

    def reset_parameters(self) -> None:
        pass


class Expert(nn.Module):
    """down(act(gate(x)) · up(x)), without biases and without weights as yet.

    names: of the gate, up and down linears. width, inner: of hidden states and between the linears.
    """

    def __init__(
        self, names: tuple[str, str, str], width: int, inner: int, act: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.names, self.act = names, act
        for name, (columns, rows) in zip(names, ((width, inner), (width, inner), (inner, width)), strict=True):
            linear = Projection(columns, rows, bias=False, device="meta", dtype=dtype)
            self.add_module(name, linear.requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self._modules[name] for name in self.names)
        assert gate and up and down
        return down(self.act(gate(x)) * up(x))  # type: ignore[no-any-return]


class Experts(nn.ModuleList):
    """Takes the place of a fused experts module, behind the model's own router."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden: (n, C). chosen: experts of each token, (n, k) int64. weights: of their outputs, (n, k).

        Calls every linear of every expert in the same order whatever the routing, with (0, C) where an expert has no
        token: passes that run in lock step halt at each. Sums in float32, so that the order of experts does not show
        (transformers' default sums k terms at once, to the same precision).
        """
        total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        flat = chosen.reshape(-1)
        counts = torch.bincount(flat, minlength=len(self)).tolist()
        places = torch.split(flat.argsort(stable=True), counts)  # which (token, choice) pairs each expert got
        flat_weights = weights.reshape(-1, 1)
        for expert, own in zip(self, places, strict=True):
            tokens = own // chosen.shape[1]
            total.index_add_(0, tokens, (expert(hidden[tokens]) * flat_weights[own]).float())
        return total.to(hidden.dtype)


def unfuse(model: nn.Module, row: Architecture) -> None:
    """Replaces every fused experts module of a model without weights."""
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    for name, module in fused.items():
        down = module.get_parameter("down_proj")
        count, width, inner = down.shape
        act = module.act_fn
        experts = Experts(Expert(row.expert, width, inner, act, down.dtype) for _ in range(count))
        model.set_submodule(name, experts)


def split(entries: dict[str, Entry], row: Architecture) -> dict[str, Entry]:
    """Where every tensor lies, with fused experts taken apart: an expert's gate, up and down are rows one by one."""
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        match = FUSED.search(name)
        if match is None or len(entry.shape) != 3:
            found[name] = entry
            continue
        gate, up, down = row.expert
        parts = (gate, up) if match[1] == "gate_up_proj" else (down,)
        count, rows, columns = entry.shape
        if rows % len(parts):
            found[name] = entry  # no such model; whoever asks for the parts will say that they are missing
            continue
        size_bytes = (entry.end - entry.start) // max(count * len(parts), 1)
        experts = row.file_name(name).rpartition(".")[0]
        for n, (expert, part) in enumerate((e, p) for e in range(count) for p in parts):
            start = entry.start + n * size_bytes
            found[f"{experts}.{expert}.{part}.weight"] = replace(
                entry, shape=(rows // len(parts), columns), start=start, end=start + size_bytes
            )
    return found


def refuse_torn(experts: Iterable[tuple[str, ...]], schemes: Mapping[str, Scheme]) -> None:
    """Raises FormatUnfit where readers, which stack the experts of a layer, could not do so.

    experts: names of the linears of each. schemes: how each linear that is quantized will be stored. Source: trying it
    with transformers 5.23 and compressed-tensors 0.20, which unpack experts while loading: where one projection is left
    in 16 bits its stack keeps the values that it was drawn with, and zero points are not looked for.
    """
    names = [name for each in experts for name in each]
    left = next((name for name in names if name not in schemes), None)
    if left is not None:
        raise FormatUnfit(
            f"`ignore` leaves {left} in 16 bits, but readers stack the experts of a mixture and want all of them "
            "quantized: leave no expert out",
            param="ignore",
        )
    if len({schemes[name] for name in names}) > 1:
        raise FormatUnfit("readers stack the experts of a mixture, which must all be quantized alike", param="bits")
    if any(schemes[name].element == "int" and not schemes[name].symmetric for name in names):
        raise FormatUnfit(
            "transformers does not look for the zero points of experts; set `symmetric` to true", param="symmetric"
        )


def _is_fused(module: nn.Module) -> bool:
    parts = (module._parameters.get("gate_up_proj"), module._parameters.get("down_proj"))
    return all(part is not None and part.ndim == 3 for part in parts)
