"""Training of the last decoder blocks, in float32, with what comes after them."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from models.streaming.frame import Frame
from models.weights.quantized import Site
from squeeze.errors import ModelMalformed
from squeeze.steps.finetuning import LastLayers

BLOCK = re.compile(r"(.*?)\.(\d+)\.")  # the path of the list that holds the blocks, and which of them


def sites_of(frame: Frame, step: LastLayers) -> list[Site]:
    """The linear layers of the blocks that are trained; raises ModelMalformed where there are fewer blocks."""
    if step.layers > frame.count:
        raise ModelMalformed(f"the model has {frame.count} decoder blocks, not {step.layers}", param="layers")
    return [site for n in range(frame.count - step.layers, frame.count) for site in frame.sites(n)]


def finetune(model: Any, step: LastLayers, names: Sequence[str]) -> Any:  # noqa: ARG001 - they say which blocks
    """The model with the blocks of the named linears, the last norm and a head of its own in float32, which learn.

    Embeddings stay as they are, and with them a head that is tied to them.
    """
    found = [match for match in map(BLOCK.match, names) if match]
    blocks, lists = {f"{match[1]}.{match[2]}." for match in found}, {f"{match[1]}." for match in found}
    kept = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        outside = not any(name.startswith(path) for path in lists) and id(parameter) not in kept
        if outside or any(name.startswith(block) for block in blocks):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return model
