"""Training of all weights of a model, in float32."""

from collections.abc import Sequence
from typing import Any

from models.streaming.frame import Frame
from models.weights.quantized import Site
from squeeze.steps.finetuning import Full


def sites_of(frame: Frame, step: Full) -> list[Site]:  # noqa: ARG001 - all, whatever it says
    """The linear layers that are trained, in the model's order; embeddings and norms are trained beside them."""
    return [site for n in range(frame.count) for site in frame.sites(n)]


def finetune(model: Any, step: Full, names: Sequence[str]) -> Any:  # noqa: ARG001 - all, whatever these are
    """The model with all of its parameters in float32, which learn."""
    return model.float().requires_grad_(True)
