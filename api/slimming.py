"""What a model has of each tensor once a job has made it smaller, from config and headers: for plans, and at submit."""

from collections.abc import Mapping
from typing import Any

from api.service import Service
from api.sources import files_of
from api.tensors import Tensor, config_of, tensors_of
from squeeze.architectures import ARCHITECTURES
from squeeze.errors import ArchitectureUnsupported, ModelAlreadyCompressed, SpecInvalid, SqueezeError
from squeeze.slim_shapes import carried, narrowed
from squeeze.slimming import Slim
from squeeze.specs import JobSpec


def refuse_unmeetable(service: Service, project: str, spec: JobSpec) -> None:
    """Raises where config and headers show that the model can't be made as small, or is quantized already. What can't
    be looked at now is the worker's to refuse.
    """
    step = spec.steps[0]
    if not isinstance(step, Slim):
        return
    try:
        files = files_of(service, project, spec.model)
        config = config_of(files)
        tensors = {} if config.get("quantization_config") else tensors_of(files)
    except SqueezeError:  # of the model a job says itself what is wrong
        return
    if config.get("quantization_config"):
        raise ModelAlreadyCompressed(
            "The model's weights are quantized already; name the model it was made from.", param="model"
        )
    if tensors and config.get("model_type") in ARCHITECTURES:
        slimmed(step, config, tensors)


def slimmed(
    step: Slim, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of the smaller model. Raises SpecInvalid and ArchitectureUnsupported, naming the field."""
    held = carried(config, tensors)
    try:
        settings, sides = narrowed(step, config, {name: one.shape for name, one in held.items()})
    except (SpecInvalid, ArchitectureUnsupported) as error:
        error.param = error.param and f"steps.0.{error.param}"
        raise
    return settings, {name: Tensor(held[name].dtype, each) for name, each in sides.items()}
