"""Whether a model's linears can be written as factors with as few parameters as a job wants, from its headers."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod

from api.service import Service
from api.sources import files_of
from api.sparsifying import transposed
from api.tensors import Linear, Tensor, config_of, linears_of, tensors_of
from squeeze.errors import ModelAlreadyCompressed, SpecInvalid, SqueezeError
from squeeze.shapes.model import BLOCK
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.factoring import SVD, Sides, budget_of, uniform_ranks


def refuse_unfactorable(service: Service, project: str, spec: JobSpec) -> None:
    """Raises where the model that comes with the job can't be factored so: quantized already, or to so few parameters.
    What can't be looked at now, or is made by a step before, is the worker's to refuse.
    """
    if not isinstance(spec.steps[0], SVD):
        return
    try:
        files = files_of(service, project, spec.model)
        config = config_of(files)
        tensors = {} if config.get("quantization_config") else tensors_of(files)
    except SqueezeError:  # of the model a job says itself what is wrong
        return
    if config.get("quantization_config"):
        raise ModelAlreadyCompressed("The model's weights are quantized already; name the model it was made from.")
    for error in missed_targets(spec, tensors, linears_of(tensors, transposed=transposed(config))):
        raise error


def missed_targets(spec: JobSpec, tensors: Mapping[str, Tensor], linears: Sequence[Linear]) -> Iterator[SqueezeError]:
    """Of a step whose share of parameters can't be met, what would do. tensors: of the model that it is given."""
    for number, step in enumerate(spec.steps):
        if not isinstance(step, SVD) or not tensors or _fused(tensors):
            continue
        try:
            budget_of(step, _parameters(tensors), sides_of(step, linears))
        except SpecInvalid as error:
            error.param = f"steps.{number}.{error.param}"
            yield error


def parameters_with_factors(step: SVD, tensors: Mapping[str, Tensor], linears: Sequence[Linear]) -> int:
    """Of the model with its factors: exactly, where every layer keeps the same share; otherwise the most."""
    whole, sides = _parameters(tensors), sides_of(step, linears)
    if step.ranks != "uniform" or _fused(tensors):
        return int(step.params_target * whole)
    try:
        found = uniform_ranks(step, budget_of(step, whole, sides), sides)
    except SpecInvalid:
        return int(step.params_target * whole)
    return whole - sum(one.whole - one.kept(found[name]) for name, one in sides.items())


def sides_of(step: SVD, linears: Sequence[Linear]) -> dict[str, Sides]:
    """Of the linears that the step does not ignore, by their names."""
    return {
        one.name: Sides(one.rows, one.columns)
        for one in linears
        if not any(fnmatchcase(one.name, pattern) for pattern in step.ignore)
    }


def _parameters(tensors: Mapping[str, Tensor]) -> int:
    return sum(prod(one.shape) for one in tensors.values())


def _fused(tensors: Mapping[str, Tensor]) -> bool:
    """Whether linears stand in tensors of several, as some files keep experts: how many there are is not seen here."""
    return any(len(one.shape) > 2 and BLOCK.search(name) for name, one in tensors.items())
