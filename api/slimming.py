"""What a model has of each tensor once a job has made it smaller, from config and headers: for plans, and at submit."""

from collections.abc import Mapping
from typing import Any

from api.service import Service
from api.sources import files_of
from api.tensors import Tensor, config_of, tensors_of
from squeeze.errors import ArchitectureUnsupported, ModelAlreadyCompressed, SpecInvalid, SqueezeError
from squeeze.shapes.architectures import ARCHITECTURES
from squeeze.shapes.slimmed import carried, narrowed
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import Distill
from squeeze.steps.slimming import Slim


def refuse_unmeetable(service: Service, project: str, spec: JobSpec) -> None:
    """Raises where config and headers show that the model can't be made as small, or is quantized already. What can't
    be looked at now is the worker's to refuse.
    """
    if not any(isinstance(step, Slim) for step in spec.steps):
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
    if not tensors or config.get("model_type") not in ARCHITECTURES:
        return
    for number, step in enumerate(spec.steps):
        if isinstance(step, Distill) and step.student.named:
            return  # what follows works on another model
        if isinstance(step, Slim):
            config, tensors = slimmed(step, config, tensors, number)


def slimmed(
    step: Slim, config: dict[str, Any], tensors: Mapping[str, Tensor], number: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of the smaller model. number: the step's in the job. Raises SpecInvalid and
    ArchitectureUnsupported, naming the field.
    """
    held = carried(config, tensors)
    try:
        settings, sides = narrowed(step, config, {name: one.shape for name, one in held.items()})
    except (SpecInvalid, ArchitectureUnsupported) as error:
        error.param = error.param and f"steps.{number}.{error.param}"
        raise
    return settings, {name: Tensor(held[name].dtype, each) for name, each in sides.items()}
