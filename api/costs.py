"""What a spec would cost on a model of that shape: memory of all its steps, and their seconds together."""

from collections import Counter
from typing import Any

from api.learning import text_bytes_of
from api.service import Service
from api.tensors import Tensor
from jobs import history
from squeeze.choosing import supposed
from squeeze.distillation import Distill
from squeeze.finetuning import Finetune, QLoRA
from squeeze.memory import PROCESS_BYTES, needed
from squeeze.merging import Merge
from squeeze.merging_work import counted_merging, merging_bytes
from squeeze.pace import duration
from squeeze.shapes import Shape, shape_of
from squeeze.specs import JobSpec
from squeeze.steps import RTN, Format, Quantize
from squeeze.trainable import Learned, learned
from squeeze.training_memory import needed_to_train
from squeeze.training_work import counted_training, tokens_to_train
from squeeze.work import Count, counted


def cost_of(
    service: Service,
    project: str,
    spec: JobSpec,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    result_bytes: dict[Format, int],
) -> dict[str, Any]:
    """`host_bytes`, `least_host_bytes` and `seconds` of a plan; nothing where the headers show no blocks, and of what
    can't be counted: a distillation, the time of examples of unknown number.
    """
    shape = shape_of_model(config, tensors, _ignored(spec))
    if not shape.blocks or any(isinstance(step, Distill) for step in spec.steps):
        return {}
    whole = least = stays = 0
    found: dict[str, Any] = {}
    counts: dict[str, Count] | None = {}
    for step in spec.steps:
        if isinstance(step, Finetune):
            text_bytes = text_bytes_of(service, project, spec)
            own, known = shape_of_model(config, tensors), learned_of(step, config, tensors)
            last, parameters = step is spec.steps[-1], sum(tensor.elements for tensor in tensors.values())
            spec, step, found["chosen"] = supposed(spec, step, parameters, own.positions)  # noqa: PLW2901
            memory = needed_to_train(own, spec, step, known, result_bytes if last else {}, text_bytes or 0)
            whole, least = max(whole, memory.whole), max(least, memory.whole)
            stays = memory.process - PROCESS_BYTES  # what was imported, and the examples
            length = min(spec.data.length, own.positions or spec.data.length)
            tokens = tokens_to_train(spec, step, length, text_bytes)
            learning = None if tokens is None else counted_training(own, spec, step, known, tokens, last=last)
            counts = None if counts is None or learning is None else _together(counts, learning)
        elif isinstance(step, Merge):
            last = step is spec.steps[-1]
            own = shape_of_model(config, tensors)
            largest = max((tensor.elements for tensor in tensors.values()), default=0)
            # The merged model runs beside the base, block by block, as one does whose blocks are rounded.
            plain = spec.model_copy(update={"steps": (RTN(method="rtn"),)})
            measured = needed(own, plain, result_bytes if last else {})
            whole = max(merging_bytes(largest), measured.whole)
            least = max(merging_bytes(largest), measured.least)
            counts = counted_merging(own, spec, step)
        elif isinstance(step, Quantize):
            more = needed(shape, spec, result_bytes)
            whole, least = max(whole, more.whole + stays), max(least, more.least + stays)
            counts = None if counts is None else _together(counts, counted(shape, spec))
    found |= {"host_bytes": whole, "least_host_bytes": least}
    if counts is not None:
        gpu = spec.limits.gpus > 0 or None  # without the wish, whatever worker is free takes it
        method = spec.steps[-1].method
        with service.database.read() as session:
            past = history.finished(session, method, gpu=gpu)
        found["seconds"] = duration(counts, len(shape.blocks), method, past, gpu=bool(gpu))
    return found


def shape_of_model(config: dict[str, Any], tensors: dict[str, Tensor], ignored: list[str] | None = None) -> Shape:
    """ignored: patterns of linears that are not compressed."""
    dtypes = Counter(tensor.dtype for tensor in tensors.values())
    dtype = max(dtypes, key=dtypes.__getitem__, default="BF16")
    return shape_of(config, {name: tensor.shape for name, tensor in tensors.items()}, dtype, ignored or [])


def learned_of(step: Finetune, config: dict[str, Any], tensors: dict[str, Tensor]) -> Learned:
    return learned(step, config, {name: tensor.shape for name, tensor in tensors.items()})


def kept_bytes(spec: JobSpec, config: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """On the worker's disk: of a training two checkpoints, a byte a weight of a base that is rounded for it, and every
    whole model that a next step goes on with.
    """
    step = next((step for step in spec.steps if isinstance(step, Finetune)), None)
    merged = 2 * sum(tensor.elements for tensor in tensors.values()) if isinstance(spec.steps[0], Merge) else 0
    merged *= len(spec.steps) > 1  # otherwise it is the result
    if step is None:
        return merged
    known = learned_of(step, config, tensors)
    whole = 2 * sum(tensor.elements for tensor in tensors.values()) if step is not spec.steps[-1] else 0
    codes = known.rounded if isinstance(step, QLoRA) and step.base == "gptq" else 0
    return 2 * (4 * known.parameters + known.state_bytes) + codes + whole + merged


def _ignored(spec: JobSpec) -> list[str]:
    return [pattern for step in spec.steps if isinstance(step, Quantize) for pattern in step.ignore]


def _together(first: dict[str, Count], second: dict[str, Count]) -> dict[str, Count]:
    none = Count()
    return {
        stage: Count(
            first.get(stage, none).fixed + second.get(stage, none).fixed,
            first.get(stage, none).blocks + second.get(stage, none).blocks,
        )
        for stage in (*first, *(stage for stage in second if stage not in first))
    }
