"""What a job works on in its later steps, from configs and headers alone: a student, or what was made smaller."""

from dataclasses import dataclass, field
from typing import Any

from api.service import Service
from api.slimming import slimmed
from api.sources import files_of
from api.tensors import Tensor, config_of, tensors_of
from squeeze.errors import ArchitectureUnsupported, ModelAlreadyCompressed, SqueezeError
from squeeze.shapes.architectures import ARCHITECTURES
from squeeze.shapes.model import BLOCK, of_blocks
from squeeze.specs.job_spec import JobSpec
from squeeze.specs.rounds import Round, rounds_of
from squeeze.steps.distillation import Distill, evenly
from squeeze.steps.slimming import Slim


@dataclass(frozen=True)
class Made:
    """The model that is worked on once a distillation is over, or one made smaller; otherwise the job's own.

    config, tensors: empty where they can't be told. pulled_bytes: that the worker has to fetch for it. obstacles: what
    stands in its way.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    pulled_bytes: int = 0
    obstacles: list[SqueezeError] = field(default_factory=list)


@dataclass(frozen=True)
class Leg:
    """A round of a job as a plan sees it. config, tensors: of the model that it begins with; empty where they can't be
    told. made: what its steps that compress, and the next round, work on.
    """

    part: Round
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    made: Made


def legs_of(
    service: Service, project: str, spec: JobSpec, config: dict[str, Any], tensors: dict[str, Tensor]
) -> list[Leg]:
    """Of most jobs one. config, tensors: of the job's own model."""
    legs = []
    for part in rounds_of(spec):
        made = _made_by(service, project, part, config, tensors)
        legs.append(Leg(part, config, tensors, made))
        config, tensors = made.config, made.tensors
    return legs


def _made_by(service: Service, project: str, part: Round, config: dict[str, Any], tensors: dict[str, Tensor]) -> Made:
    for number, step in enumerate(part.spec.steps, start=part.first):
        if isinstance(step, Slim) and tensors:
            try:
                config, tensors = slimmed(step, config, tensors, number)
            except SqueezeError as error:
                return Made({}, {}, obstacles=[error])
        if isinstance(step, Distill) and step.student.model is not None:
            return _named(service, project, step.student.model, f"steps.{number}.student.model")
        if isinstance(step, Distill) and step.student.layers is not None:
            return Made(config, _cut(tensors, step.student.layers))
    return Made(config, tensors)


def depth(tensors: dict[str, Tensor]) -> int:
    """Decoder blocks."""
    return len({found[1] for name in tensors if (found := BLOCK.search(name))})


def _cut(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Of a teacher that is too shallow for it nothing is left out; that is an obstacle of its own."""
    blocks = depth(tensors)
    return tensors if layers >= blocks else of_blocks(tensors, evenly(blocks, layers))


def _named(service: Service, project: str, model: str, param: str) -> Made:
    try:
        files = files_of(service, project, model)
        config, tensors = config_of(files), tensors_of(files)
        if config.get("quantization_config"):
            raise ModelAlreadyCompressed("The student's weights are quantized; name the model they were made from.")
        if config.get("model_type") not in ARCHITECTURES:
            supported = ", ".join(sorted(ARCHITECTURES))
            raise ArchitectureUnsupported(
                f"The student's model_type {config.get('model_type')!r} is not supported. Supported: {supported}."
            )
    except SqueezeError as error:
        error.param = param
        return Made({}, {}, obstacles=[error])
    return Made(config, tensors, sum(files.sizes.values()) if files.pulled else 0)
