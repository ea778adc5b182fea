"""Whether what a job merges goes together, from configs and headers: before the job is taken, and in its plan."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from api.service import Service
from api.sources import Files, files_of
from api.tensors import Tensor, adapter_of, adapter_tensors_of, config_of, tensors_of
from squeeze.errors import ModelAlreadyCompressed, ModelMalformed, ModelUnsafe, SqueezeError
from squeeze.shapes.adapters import refuse_unmergeable
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.merging import Entry, Merge

# What another model may not have another of, where both configs say it.
ALIKE = (
    "model_type",
    "hidden_size",
    "n_embd",
    "vocab_size",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
LORA = (".lora_A.weight", ".lora_B.weight")


@dataclass
class Looked:
    """obstacles: what stands in the way. pulled_bytes: that the worker has to fetch."""

    obstacles: list[SqueezeError] = field(default_factory=list)
    pulled_bytes: int = 0


def refuse_unlike(service: Service, project: str, spec: JobSpec) -> None:
    """Raises where the settings of what is to be merged show that it doesn't go together: of another architecture, of
    another base, quantized, an adapter that can't be merged. What can't be looked at now is the worker's to refuse.
    """
    step = spec.steps[0]
    if not isinstance(step, Merge):
        return
    try:
        config = config_of(files_of(service, project, spec.model))
    except SqueezeError:  # of the base a job says itself what is wrong
        return
    for error in look_at_entries(service, project, spec, config, None).obstacles:
        if isinstance(error, ModelMalformed | ModelAlreadyCompressed | ModelUnsafe):
            raise error


def look_at_entries(
    service: Service, project: str, spec: JobSpec, config: dict[str, Any], tensors: dict[str, Tensor] | None
) -> Looked:
    """Of each entry of a step that merges, the first thing that is wrong. config, tensors: the base's; without tensors
    no headers are read.
    """
    looked, step = Looked(), spec.steps[0]
    for number, entry in enumerate(step.models if isinstance(step, Merge) else ()):
        try:
            files = files_of(service, project, entry.name, adapter=True)
            looked.pulled_bytes += sum(files.sizes.values()) if files.pulled else 0
            _refuse(files, entry, spec.model, config, tensors)
        except SqueezeError as error:
            error.param = f"steps.0.models.{number}.model"
            looked.obstacles.append(error)
    return looked


def _refuse(files: Files, entry: Entry, base: str, config: dict[str, Any], tensors: dict[str, Tensor] | None) -> None:
    label = PurePosixPath(entry.name).name if entry.name.startswith("/") else entry.name
    settings = adapter_of(files)
    if settings is not None:
        ours = PurePosixPath(base).name if base.startswith("/") else base
        refuse_unmergeable(settings, label, ours, same_base=entry.same_base)
        if tensors:
            _refuse_other_adapter(label, adapter_tensors_of(files), tensors)
        return
    its = config_of(files)
    if its.get("quantization_config"):
        raise ModelAlreadyCompressed(
            f"The weights of {label} are quantized; name the 16-bit model that they were made from."
        )
    for name in ALIKE:
        if name in config and name in its and config[name] != its[name]:
            raise ModelMalformed(
                f"{label} has {name} {its[name]!r}, the base {config[name]!r}: merged are models that were finetuned "
                "from one base."
            )
    if tensors:
        _refuse_other_shapes(label, tensors_of(files), tensors)


def _refuse_other_shapes(label: str, its: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name in tensors.keys() & its.keys():
        if its[name].shape != tensors[name].shape:
            raise ModelMalformed(
                f"{label} has tensor {name} of shape {list(its[name].shape)}, the base {list(tensors[name].shape)}: "
                "merged are models of one base, with its shapes and its vocabulary."
            )


def _refuse_other_adapter(label: str, its: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in its.items():
        for part, place in zip(LORA, (1, 0), strict=True):
            module = name.removeprefix("base_model.model.").removesuffix(part)
            base = tensors.get(f"{module}.weight") if name.endswith(part) else None
            if base is not None and (len(tensor.shape) != 2 or tensor.shape[place] not in base.shape):
                raise ModelMalformed(
                    f"{label} has {name} of shape {list(tensor.shape)} for a layer of shape {list(base.shape)}: it is "
                    "an adapter of another model."
                )
