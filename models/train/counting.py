"""What a training is expected to take, told once the batches are known, and kept for the plans of later jobs."""

from models.train.packing import Plan
from models.train.prepare import Prepared
from models.work import work_of_distilling
from squeeze.costs.distillation_work import Lessons
from squeeze.costs.trainable import FEWEST_LABELS, learned
from squeeze.costs.training_work import counted_training
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.distillation import Distill


def work_of(prepared: Prepared, plan: Plan, spec: JobSpec) -> dict[str, float]:
    """Operations by stage, as `squeeze.costs.work` counts them."""
    step, source, data = prepared.step, prepared.source, prepared.split.data
    tokens = int(plan.steps * step.sequences * data.tokens / len(plan.rows))  # as full as sequences are on average
    if isinstance(step, Distill):
        assert prepared.teacher is not None, "a distillation has a teacher"
        told = Lessons(data.tokens, tokens, data.examples)
        return work_of_distilling(prepared.teacher, source, spec, step, told, plan.steps)
    tensors = {name: entry.shape for name, entry in source.entries.items()}
    counts = counted_training(
        source.shape(),
        spec,
        step,
        learned(step, source.config, tensors, max(len(prepared.labels), FEWEST_LABELS)),
        tokens,
        steps=plan.steps,
        last=step is spec.steps[-1],
    )
    return {stage: count.whole for stage, count in counts.items()}
