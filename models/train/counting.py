"""What a training is expected to take, told once the batches are known, and kept for the plans of later jobs."""

from collections.abc import Collection

from models.train.packing import Plan
from models.train.prepare import Prepared
from squeeze.finetuning import Finetune
from squeeze.specs import JobSpec
from squeeze.steps import Quantize
from squeeze.trainable import FEWEST_LABELS, learned
from squeeze.training_work import counted_training
from squeeze.work import counted

BEFORE = ("loading", "compressing", "evaluating")  # a training; the last two of a base that is rounded first


def work_of(prepared: Prepared, plan: Plan, spec: JobSpec) -> dict[str, float]:
    """Operations by stage, as `squeeze.work` counts them; empty where they can't be counted."""
    step, source = prepared.step, prepared.source
    if not isinstance(step, Finetune):
        return {}
    tensors = {name: entry.shape for name, entry in source.entries.items()}
    filled = prepared.split.data.tokens / len(plan.rows)  # tokens of a sequence, on average
    counts = counted_training(
        source.shape(),
        spec,
        step,
        learned(step, source.config, tensors, max(len(prepared.labels), FEWEST_LABELS)),
        int(plan.steps * step.sequences * filled),
        steps=plan.steps,
        last=step is spec.steps[-1],
    )
    return {stage: count.whole for stage, count in counts.items()}


def ahead(
    work: dict[str, float], prepared: Prepared, spec: JobSpec, *, without: Collection[str] = BEFORE
) -> dict[str, float]:
    """The same for what is left once the model is loaded, with the step that follows. without: stages that are over."""
    source = prepared.source
    left = {stage: each for stage, each in work.items() if stage not in without}
    for step in spec.steps:
        if isinstance(step, Quantize):
            left = summed(left, {name: count.whole for name, count in counted(source.shape(step.ignore), spec).items()})
    return left


def summed(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Work by stage of two steps together."""
    return {stage: first.get(stage, 0.0) + second.get(stage, 0.0) for stage in {**first, **second}}
