"""Whether weights of a model can be zeroed as a job wants it, from its config and headers."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from api.service import Service
from api.sources import files_of
from api.tensors import Linear, config_of, linears_of, tensors_of
from squeeze.errors import ArchitectureUnsupported, ModelAlreadyCompressed, SpecInvalid, SqueezeError
from squeeze.shapes.mixtures import refuse_unscored
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.movement import Movement
from squeeze.steps.sparsifying import Zeroes, refuse_torn_pattern


def refuse_unprunable(service: Service, project: str, spec: JobSpec) -> None:
    """Raises where the model that comes with the job can't be pruned so: quantized already, or with layers that a
    pattern does not fit. What can't be looked at now, or is made by a step before, is the worker's to refuse.
    """
    step = spec.steps[0]
    if not isinstance(step, Compress | Zeroes) or not step.zeroed:
        return
    try:
        files = files_of(service, project, spec.model)
        config = config_of(files)
        linears = linears_of(tensors_of(files), transposed=transposed(config)) if step.group is not None else []
    except SqueezeError:  # of the model a job says itself what is wrong
        return
    if config.get("quantization_config"):
        raise ModelAlreadyCompressed("The model's weights are quantized already; name the model it was made from.")
    for error in (*unscored(spec, config), *torn_patterns(spec, linears)):
        raise error


def unscored(spec: JobSpec, config: dict[str, Any]) -> Iterator[SqueezeError]:
    """Of each step that learns scores for weights which a mixture keeps in its experts."""
    for number, step in enumerate(spec.steps):
        if isinstance(step, Movement):
            try:
                refuse_unscored(config.get("model_type"), f"steps.{number}.method")
            except ArchitectureUnsupported as error:
                yield error


def torn_patterns(spec: JobSpec, linears: Sequence[Linear]) -> Iterator[SqueezeError]:
    """Of each step whose pattern does not fit the layers."""
    for number, step in enumerate(spec.steps):
        if not isinstance(step, Compress | Zeroes) or step.group is None:
            continue
        columns = {
            linear.name: linear.columns
            for linear in linears
            if not any(fnmatchcase(linear.name, pattern) for pattern in step.ignore)
        }
        try:
            refuse_torn_pattern(step, columns)
        except SpecInvalid as error:
            error.param = f"steps.{number}.{error.param}"
            yield error


def transposed(config: dict[str, Any]) -> bool:
    """Whether the files keep linears (in, out)."""
    return config.get("model_type") == "gpt2"
