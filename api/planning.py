"""What a spec would need and what stands in its way, from the model's config and headers alone: estimates."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from api.costs import Costs, learned_of, shape_of_model
from api.factoring import missed_targets, parameters_with_factors
from api.learning import Seen, refuse_misfit, refuse_unusable
from api.merging import look_at_entries
from api.service import Service
from api.sources import Files, files_of, refuse_absent_dataset
from api.sparsifying import torn_patterns, transposed, unscored
from api.teaching import Made, depth, legs_of
from api.tensors import Linear, Tensor, config_of, linears_of, tensors_of
from jobs import files as uploads
from squeeze.errors import (
    ArchitectureUnsupported,
    DataUnusable,
    FormatUnfit,
    GroupSizeIndivisible,
    HubUnavailable,
    ModelAlreadyCompressed,
    ModelMalformed,
    ModelUnsafe,
    SpecInvalid,
    SqueezeError,
)
from squeeze.names import Format
from squeeze.objects import Obstacle, Plan
from squeeze.shapes.architectures import (
    ARCHITECTURES,
    HELD_BY,
    refuse_classifier,
    refuse_unclassifiable,
    refuse_unrotatable,
)
from squeeze.specs.bases import rounding
from squeeze.specs.formats import OF_ANY_FAMILY, refuse_unfit
from squeeze.specs.job_spec import SELF, JobSpec, hub_text
from squeeze.specs.saving import savings
from squeeze.steps.compressing import Compress
from squeeze.steps.distillation import Distill
from squeeze.steps.factoring import SVD
from squeeze.steps.finetuning import Adapters, Head, LoRA, QLoRA
from squeeze.steps.quantization import Grouped, Quantize
from squeeze.steps.slimming import Paced, Slim
from squeeze.steps.training import Train

MERGED = frozenset({"safetensors"})  # formats that hold factors multiplied out
LEAST = {"bits": 2, "target_bytes": None}


def plan(service: Service, project: str, spec: JobSpec) -> Plan:
    """Everything that can be found at once: one obstacle does not hide the others."""
    obstacles, seen = [_obstacle(error) for error in _before_the_model(service, project, spec)], Seen()
    try:
        seen = refuse_unusable(service, project, spec)
    except SqueezeError as error:
        obstacles.append(_obstacle(error))
    try:
        files = files_of(service, project, spec.model)
        config = config_of(files)
        tensors = tensors_of(files)
    except SqueezeError as error:
        return _answer([*obstacles, _obstacle(error)], saves=savings(spec.steps, spec.formats))
    legs = legs_of(service, project, spec, config, tensors)
    made = legs[-1].made
    obstacles += [_obstacle(error) for leg in legs for error in leg.made.obstacles]
    every = linears_of(made.tensors, transposed=transposed(made.config))
    linears = _compressed(spec, every)
    obstacles += map(_obstacle, (*unscored(spec, config), *torn_patterns(spec, every)))
    obstacles += map(_obstacle, missed_targets(spec, made.tensors, every))
    obstacles += [_obstacle(error) for error in _in_the_model(spec, config, files, tensors, made, linears)]
    if any(isinstance(step, Train) for step in spec.steps):
        try:
            refuse_misfit(files, shape_of_model(config, tensors).positions, seen.chat)
        except SqueezeError as error:
            obstacles.append(_obstacle(error))
    looked = look_at_entries(service, project, spec, config, tensors)
    obstacles += map(_obstacle, looked.obstacles)
    source_bytes = sum(tensor.size_bytes for tensor in tensors.values()) or _weight_bytes(files)
    result_bytes = _result_bytes(spec, made, linears) if made.tensors else {}
    costs = Costs(service, project, spec, legs, seen.records)
    return _answer(
        obstacles,
        saves=savings(spec.steps, spec.formats),
        model_revision=files.revision,
        parameters=sum(tensor.elements for tensor in tensors.values()) or None,
        source_bytes=source_bytes,
        result_bytes=result_bytes,
        **_parameters_left(spec, made, every),
        result_parameters_estimated=any(isinstance(one, Paced) and one.speed_target is not None for one in spec.steps),
        **costs.told(result_bytes),
        disk_bytes=(source_bytes if files.pulled else 0)
        + looked.pulled_bytes
        + sum(leg.made.pulled_bytes for leg in legs)
        + sum(result_bytes.values())
        + max([0, *result_bytes.values()])
        + costs.kept_bytes(),
    )


def _answer(obstacles: list[Obstacle], **estimates: Any) -> Plan:
    return Plan(feasible=not obstacles, obstacles=obstacles, **estimates)


def _obstacle(error: SqueezeError) -> Obstacle:
    return Obstacle(code=error.code, message=error.message, param=error.param)


def _before_the_model(service: Service, project: str, spec: JobSpec) -> Iterator[SqueezeError]:
    try:
        refuse_unfit(spec.steps, spec.formats)
    except FormatUnfit as error:
        yield error
    for param, file_id in (("data.source", spec.data.source), ("evaluation.source", spec.evaluation.source)):
        if file_id is None or file_id == SELF:
            continue
        try:
            if (name := hub_text(file_id)) is not None:
                refuse_absent_dataset(service.hub, name)
                continue
            with service.database.read() as session:
                uploads.find(session, project, file_id)
        except (DataUnusable, HubUnavailable) as error:
            error.param = param
            yield error
        except SqueezeError as error:
            yield SpecInvalid(error.message, param=param)


def _in_the_model(
    spec: JobSpec,
    config: dict[str, Any],
    files: Files,
    tensors: dict[str, Tensor],
    made: Made,
    linears: list[Linear],
) -> Iterator[SqueezeError]:
    """What the engine would refuse, in its own words where they are the same. made: what is written. linears: of it."""
    kind = config.get("model_type")
    supported = ", ".join(sorted(ARCHITECTURES))
    if not isinstance(kind, str):
        yield ModelMalformed("config.json names no model_type, so nobody can tell what kind of model this is.")
    elif kind not in ARCHITECTURES and "auto_map" in config:
        yield ModelUnsafe(
            f"The model ({kind}) needs Python code of its own, which is never run. Supported: {supported}."
        )
    elif kind not in ARCHITECTURES:
        yield ArchitectureUnsupported(f"model_type {kind!r} is not supported. Supported: {supported}.", param="model")
    else:
        kind = made.config.get("model_type", kind)
        for number, name in enumerate(spec.formats):
            if name not in (*HELD_BY[kind], *OF_ANY_FAMILY):
                held = ", ".join(HELD_BY[kind])
                yield FormatUnfit(f"{name} can't hold a {kind} model; take {held}.", param=f"formats.{number}")
    try:
        refuse_classifier(config.get("architectures"))
    except ArchitectureUnsupported as error:
        yield error
    if config.get("quantization_config"):
        yield ModelAlreadyCompressed("The model's weights are quantized already; name the model it was made from.")
    if not tensors and not _weight_bytes(files):
        yield ModelMalformed("The model has no weights: neither safetensors nor .bin files.", param="model")
    for number, step in enumerate(spec.steps):
        if isinstance(step, Distill) and step.student.layers is not None and 0 < depth(tensors) <= step.student.layers:
            yield ModelMalformed(
                f"The teacher has {depth(tensors)} decoder blocks; a student that is cut from it has fewer, not "
                f"{step.student.layers}.",
                param=f"steps.{number}.student.layers",
            )
        if isinstance(step, Head) and kind in ARCHITECTURES:
            try:
                refuse_unclassifiable(kind, "model")
            except ArchitectureUnsupported as error:
                yield error
        beforehand = rounding(step, (linear.columns for linear in linears)) if isinstance(step, QLoRA) else None
        if beforehand is not None:
            step = beforehand  # noqa: PLW2901 - what it can't hold is in its way too
        if not isinstance(step, Quantize):
            continue
        if step.rotation is not None and kind in ARCHITECTURES:
            try:
                refuse_unrotatable(kind, f"steps.{number}.rotation")
            except ArchitectureUnsupported as error:
                yield error
        if isinstance(step, Grouped) and step.target_bytes is not None and made.tensors:
            smallest = min(_estimates(spec, step.model_copy(update=LEAST), made.tensors, linears).values())
            if step.target_bytes < smallest:
                yield SpecInvalid(
                    f"2 bits for all layers take about {smallest:,} bytes, more than target_bytes allows.",
                    param=f"steps.{number}.target_bytes",
                )
        group_size = step.scheme().group_size
        if not isinstance(group_size, int):
            continue
        unfit = [linear for linear in linears if linear.columns % group_size]
        if unfit:
            more = f" (and {len(unfit) - 1} more layers)" if len(unfit) > 1 else ""
            yield GroupSizeIndivisible(
                f"group_size={group_size} does not divide the {unfit[0].columns} inputs of {unfit[0].name}{more}. "
                "Take a smaller one, or `channel`, or leave those layers alone with `ignore`.",
                param=f"steps.{number}.group_size",
            )


def _compressed(spec: JobSpec, linears: list[Linear]) -> list[Linear]:
    """Those that the last step of its kind does not ignore."""
    ignored = [pattern for step in spec.compressing[-1:] for pattern in step.ignore]
    return [linear for linear in linears if not any(fnmatchcase(linear.name, pattern) for pattern in ignored)]


def _weight_bytes(files: Files) -> int:
    return sum(size for name, size in files.sizes.items() if name.endswith((".safetensors", ".bin")))


def _result_bytes(spec: JobSpec, made: Made, linears: list[Linear]) -> dict[Format, int]:
    """Of the weight files, by format."""
    step = next(iter(spec.compressing[-1:]), None)
    if step is None:
        return _trained_bytes(spec, made, linears)
    if isinstance(step, Grouped) and step.target_bytes is not None:
        return dict.fromkeys(spec.formats, step.target_bytes)
    return _estimates(spec, step, made.tensors, linears)


def _parameters_left(spec: JobSpec, made: Made, linears: list[Linear]) -> dict[str, int | None]:
    """Of what a job makes smaller, exactly or at most; nothing of other jobs."""
    factoring = next((step for step in spec.steps if isinstance(step, SVD)), None)
    multiplied_out = isinstance(spec.steps[-1], Quantize) or not set(spec.formats) - MERGED
    if factoring is not None and made.tensors and not multiplied_out:
        name = "result_parameters" if factoring.ranks == "uniform" else "most_result_parameters"
        return {name: parameters_with_factors(factoring, made.tensors, linears)}
    slims = [step for step in spec.steps if isinstance(step, Slim)]
    if not slims:
        return {}
    name = "result_parameters" if all(step.exact for step in slims) else "most_result_parameters"
    return {name: sum(tensor.elements for tensor in made.tensors.values()) or None}


def _trained_bytes(spec: JobSpec, made: Made, linears: list[Linear]) -> dict[Format, int]:
    """What was learned beside the weights in 32 bits, a whole model in 16, and what it was learned beside, rounded."""
    step = spec.steps[-1]
    beside = 4 * learned_of(step, made.config, made.tensors).parameters if isinstance(step, Adapters) else 0
    if isinstance(step, Slim):
        return dict.fromkeys(spec.formats, sum(tensor.size_bytes for tensor in made.tensors.values()))
    sizes: dict[Format, int] = {
        "peft": beside * (2 if isinstance(step, LoRA) and step.init == "pissa" else 1),
        "safetensors": 2 * sum(tensor.elements for tensor in made.tensors.values()),
        "safetensors-zst": 2 * sum(tensor.elements for tensor in made.tensors.values()),
    }
    beforehand = rounding(step, (linear.columns for linear in linears)) if isinstance(step, QLoRA) else None
    if beforehand is not None:
        sizes |= _estimates(spec.model_copy(update={"formats": ("gptq",)}), beforehand, made.tensors, linears)
    return {name: sizes[name] for name in spec.formats if name in sizes}


def _estimates(spec: JobSpec, step: Compress, tensors: dict[str, Tensor], linears: list[Linear]) -> dict[Format, int]:
    """What stays as it is, and the layers in codes, scales and zero points."""
    whole = sum(tensor.size_bytes for tensor in tensors.values())
    if isinstance(step, SVD):
        left = parameters_with_factors(step, tensors, linears) / sum(one.elements for one in tensors.values())
        return {name: whole if name in MERGED else int(whole * left) for name in spec.formats}
    kept = whole - sum(linear.size_bytes for linear in linears)
    if step.rotates and not any(name.endswith("lm_head.weight") for name in tensors):
        kept += sum(one.size_bytes for name, one in tensors.items() if name.endswith("embed_tokens.weight"))
    return {name: kept + sum(_layer_bytes(linear, step, name) for linear in linears) for name in spec.formats}


def _layer_bytes(linear: Linear, step: Compress, name: str) -> int:
    scheme = step.scheme()
    if scheme.element == "dense":
        return linear.size_bytes
    bits = scheme.bits_per_weight(linear.columns)
    if isinstance(step, Grouped):
        bits += step.average_bits - scheme.bits
    stored = int(linear.rows * linear.columns * bits / 8)
    if name not in ("gptq", "awq"):
        return stored
    groups = -(-linear.columns // scheme.columns(linear.columns))
    zeros = linear.rows * groups * scheme.bits // 8 if scheme.symmetric else 0  # it stores them all the same
    return stored + zeros + (4 * linear.columns if name == "gptq" else 0)  # the group of each input
