"""Zeros that an earlier step put into a model: a training leaves them, and the result is counted.

As with GPTQ, a matrix of a decoder block of which at least MANY_ZEROS are zero was pruned, by this job or another. The
gradients of its zeros are zero, and after every step they are set to zero again, which only optimizers need that mix
what different weights are told.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.files.checkpoint import SourceModel, open_model
from models.quantize.problem import MANY_ZEROS, pruned
from models.streaming.frame import Frame
from squeeze.errors import CompressionBug


def pruned_names(model: nn.Module, blocks: str) -> list[str]:
    """Of the whole matrices that learn and were pruned. blocks: the path of the list of decoder blocks."""
    return [
        name
        for name, one in model.named_parameters()
        if one.requires_grad
        and one.ndim > 1
        and name.startswith(f"{blocks}.")
        and int((one == 0).sum()) >= MANY_ZEROS * one.numel()
    ]


def zeros_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Where each is zero, bool, of the part of it that this process holds."""
    parameters = dict(model.named_parameters())
    return {name: held(parameters[name].detach()) == 0 for name in names}


def held(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def still_gradients(learning: Mapping[str, nn.Parameter], zeros: Mapping[str, Tensor]) -> None:
    """Sets the gradients of zeros to zero, where there are gradients."""
    for name, places in zeros.items():
        gradient = learning[name].grad
        if gradient is not None:
            held(gradient).masked_fill_(places, 0)


@torch.no_grad()
def put_back(learning: Mapping[str, Tensor], zeros: Mapping[str, Tensor]) -> None:
    for name, places in zeros.items():
        held(learning[name]).masked_fill_(places, 0)


def kept_zeros(source: SourceModel, whole: Path) -> int:
    """How many weights of the linears that were pruned are zero in both. Raises CompressionBug where one was lost."""
    written, frame = open_model(whole), Frame(source, torch.float32, torch.device("cpu"))
    count = 0
    for site in (site for n in range(frame.count) for site in frame.sites(n)):
        before = pruned(source.tensor(source.module_key(site.name, "weight")))
        if before is None:
            continue
        after = written.tensor(written.module_key(site.name, "weight")) == 0
        if not bool(after[before].all()):
            raise CompressionBug(f"{site.name} was written with fewer zeros than it had before the training")
        count += int(before.sum())
    return count
