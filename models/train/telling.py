"""What a training tells of itself: its part of the report, doubts about it, examples to certify it by."""

from itertools import accumulate
from typing import Literal, cast

from torch import Tensor

from models.certifying.running import MAX_TOKENS, MAX_WINDOWS, Sample
from models.train import domains
from models.train.accuracy import doubts
from models.train.checkpoints import Story
from models.train.examples import Examples
from models.train.prepare import Prepared
from models.train.task import Task
from models.train.zero import numel
from squeeze.reports.training import Training


def training_part(prepared: Prepared, task: Task, story: Story, after: tuple[Tensor, Tensor]) -> Training:
    """after: held-out losses of what was learned, as `mean` has them."""
    rows, step, best = task.plan.rows, prepared.step, story.best(task.masks.final)
    places = sum(one.tokens for one in story.curve)
    seconds = sum(one.seconds for one in story.curve)
    held_out = task.held_out
    return Training(
        method=step.method,
        precision=cast(Literal["fp32", "bf16", "fp16"], prepared.precision),
        trainable_parameters=sum(numel(one) for one in task.learning.values()),
        trained_modules=len(prepared.sites),
        data=prepared.split.data,
        sequence_length=prepared.length,
        packed=task.packed,
        sequences=len(rows),
        filled=prepared.split.data.tokens / (len(rows) * prepared.length),
        measured_examples=len(held_out),
        measured_tokens=int(held_out.scored.sum()),
        steps=story.done,
        planned_steps=task.plan.steps,
        stopped=story.stopped,
        best_step=best.step if best is not None and step.evaluate_every is not None else story.done,
        loss_before=story.held_out[0].loss,
        loss_after=mean(after),
        curve=story.curve,
        held_out=story.held_out,
        tokens_per_second=round(places / max(seconds, 1e-9), 1),
        resumed=story.resumed,
        processes=prepared.processes.size,
        sharding=prepared.processes.way if prepared.processes.size > 1 else None,
        domains=[]
        if task.domains is None
        else task.domains.told((task.examples, held_out), story.held_out, story.done, after),
        chosen=prepared.choices.made if prepared.choices else [],
    )


def doubts_of(training: Training, *, zeroed: bool = False) -> list[str]:
    """Warnings for who reads the report. zeroed: weights became zero meanwhile, which the loss may rise for."""
    found = domains.doubts(training.domains)
    if training.loss_after >= training.loss_before and not zeroed:
        found.append(
            f"the held-out loss rose from {training.loss_before:.4f} to {training.loss_after:.4f}: nothing was learned "
            "that holds for other examples. Take a lower learning_rate, fewer epochs, or more examples."
        )
    taught = training.distillation
    if taught is not None and taught.loss_teacher is not None and taught.loss_teacher >= training.loss_before:
        found.append(
            f"the teacher's held-out loss is {taught.loss_teacher:.4f}, no better than the student's "
            f"{training.loss_before:.4f} before it learned: on this text there is nothing to learn from it"
        )
    if training.accuracy_after is not None and training.majority_share is not None:
        return found + doubts(training.accuracy_after, training.majority_share, training.measured_examples)
    if training.measured_tokens < 1000:
        found.append(
            f"the held-out loss was measured on {training.measured_tokens} tokens, which tell little; give more "
            "examples, or a text of its own as evaluation.source"
        )
    return found


def sample_of(held_out: Examples, losses: tuple[Tensor, Tensor] | None = None, *, labels: bool = False) -> Sample:
    """Held-out examples: with their losses the first few, for those who certify the result; without them all. labels:
    each ends with the number of its label.
    """
    pairs = [held_out.one(number) for number in range(len(held_out))]
    if losses is not None:
        tokens = list(accumulate(len(ids) for ids, _ in pairs))
        pairs = [
            pair for pair, sofar in zip(pairs[:MAX_WINDOWS], tokens, strict=False) if sofar <= MAX_TOKENS
        ] or pairs[:1]
    means = None if losses is None else (losses[0] / losses[1])[: len(pairs)].tolist()
    learned = [scored.tolist() for _, scored in pairs]
    return Sample([ids.tolist() for ids, _ in pairs], [one.index(True) for one in learned], means, learned, labels)


def mean(losses: tuple[Tensor, Tensor]) -> float:
    """Nats per learned token. losses: (examples,) sums of nats, and numbers of learned tokens."""
    return float(losses[0].sum() / losses[1].sum())
