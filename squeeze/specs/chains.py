"""Which steps may follow which, on what text, in what formats, on how many GPUs. No look at a model.

Everything here raises ValueError, which says what would do.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from squeeze.names import Format
from squeeze.specs.trimming import refuse_misplaced_trimming
from squeeze.steps.distillation import Distill, Hidden, OnPolicy
from squeeze.steps.every import Step
from squeeze.steps.factoring import SVD
from squeeze.steps.finetuning import Adapters, Finetune, Head, QLoRA
from squeeze.steps.merging import Merge
from squeeze.steps.movement import Movement
from squeeze.steps.quantization import QAT, Quantize
from squeeze.steps.sharding import ZERO_STAGES
from squeeze.steps.slimming import Slim
from squeeze.steps.sparsifying import Zeroes
from squeeze.steps.training import Train
from squeeze.texts.domains import refuse_unweighable

Text = Literal["named", "own", "generic"]  # a file or a dataset; what the model itself samples; the installation's


def refuse_misplaced(steps: Sequence[Step], text: Text) -> None:
    """Where a step's place in the chain, or the text, makes no sense of it."""
    _quantizes_once_and_last(steps)
    _keeps_zeros(steps)
    _keeps_factors(steps)
    _trains_on_examples(steps, text)
    merging = [n for n, step in enumerate(steps) if isinstance(step, Merge)]
    if merging and merging != [0]:
        raise ValueError(
            "models are merged that were made from the job's model, as it comes: let one step merge, the first one"
        )
    _says_who_learns(steps)
    refuse_misplaced_trimming(steps, told=text == "named")
    refuse_unweighable(steps, named=text == "named")


def refuse_unwritable(steps: Sequence[Step], formats: Sequence[Format]) -> None:
    """Where the last step would write an adapter for a model that the job does not write."""
    last, merging = steps[-1], isinstance(steps[0], Merge)
    if merging and "peft" in formats:
        raise ValueError(
            "an adapter that is trained on what was merged would go with a model that is not written: let the step "
            "that trains merge it, and take safetensors alone as format"
        )
    if merging and isinstance(last, Adapters) and not last.merge:
        raise ValueError(
            f"what {last.method} learns goes with the merged model, which is not written alone: set its `merge` to true"
        )
    changed = any(isinstance(step, Slim | Train) for step in steps[:-1])
    if changed and isinstance(last, Adapters) and ("peft" in formats or not last.merge):
        raise ValueError(
            "an adapter that is trained on what a step made would go with a model that is not written: let the step "
            "that trains merge it, and take safetensors alone as format"
        )


def factored_before(steps: Sequence[Step]) -> Sequence[Step]:
    """The steps behind the one that factors; none where none does."""
    first = next((n for n, step in enumerate(steps) if isinstance(step, SVD)), len(steps))
    return steps[first + 1 :]


def refuse_unshared(steps: Sequence[Step], gpus: int) -> None:
    """Where so many GPUs can't share the work."""
    for step in steps:
        if isinstance(step, Quantize) and step.by_block and gpus > 1:
            raise ValueError(f"{step.method} works on whole blocks, which GPUs can't share: set limits.gpus to 1")
        if isinstance(step, QAT | Movement) and gpus > 1:
            raise ValueError(f"{step.method} trains on one GPU: set limits.gpus to 1")
        if isinstance(step, Train):
            _refuse_unshared_training(step, gpus)
    if gpus > 1 and any(isinstance(step, Train) for step in factored_before(steps)):
        raise ValueError("factors learn on one GPU, since two linears may share one of them: set limits.gpus to 1")
    if len(steps) == 1 and isinstance(steps[0], Merge) and gpus > 1:
        raise ValueError("merging is done by one process: set limits.gpus to 1")
    if len(steps) == 1 and isinstance(steps[0], Slim) and gpus > 1:
        raise ValueError("a model is made smaller by one process: set limits.gpus to 1")


def _quantizes_once_and_last(steps: Sequence[Step]) -> None:
    quantizing = [n for n, step in enumerate(steps) if isinstance(step, Quantize)]
    if len(quantizing) > 1:
        raise ValueError(
            f"steps {quantizing} all quantize; quantized weights can't be compressed again: keep one of them"
        )
    if quantizing and quantizing[0] != len(steps) - 1:
        raise ValueError("quantized weights can't be worked on again: let the step that quantizes be the last")


def _keeps_zeros(steps: Sequence[Step]) -> None:
    zeroing = [(n, step) for n, step in enumerate(steps) if isinstance(step, Zeroes)]
    for number, _ in zeroing:
        for step in steps[number + 1 :]:
            if isinstance(step, Merge | Slim) or (isinstance(step, Train) and not step.keeps_zeros):
                raise ValueError(
                    f"what step {number} zeroes, {step.method} would fill or move: let it come before that, or "
                    "leave it out; of the steps that train, `full`, `last_layers` and distillations keep zeros"
                )
            if isinstance(step, Train) and step.sharding in ZERO_STAGES:
                raise ValueError(
                    f"what step {number} zeroes has to stay zero, and with {step.sharding} nobody sees the gradients "
                    f"of {step.method}: set its sharding to ddp or full"
                )
    for step in steps if zeroing else ():
        if isinstance(step, Quantize) and step.zeroed:
            raise ValueError(
                f"step {zeroing[0][0]} zeroes weights, which {step.method} keeps: leave `sparsity` and `pattern` "
                f"of {step.method} out, or let it do both"
            )
    for (former, one), (latter, other) in pairwise(zeroing):
        if not any(isinstance(step, Train) for step in steps[former : latter + 1]):
            raise ValueError(
                f"steps {[former, latter]} both zero weights and nothing is learned between them: keep one of "
                "them, with the share that you want, or let a step between them train"
            )
        if other.sparsity <= one.sparsity:
            raise ValueError(
                f"step {latter} zeroes no more than step {former} did: {other.sparsity:g} after {one.sparsity:g}; "
                "let the share grow"
            )


def _keeps_factors(steps: Sequence[Step]) -> None:
    factoring = [n for n, step in enumerate(steps) if isinstance(step, SVD)]
    if len(factoring) > 1:
        raise ValueError(f"steps {factoring} all factor: keep one of them, with the share that you want")
    if factoring and any(isinstance(step, Zeroes) for step in steps):
        raise ValueError("products of factors have no zeros, and zeros no low rank: keep one of svd and the other")
    for step in factored_before(steps):
        if not isinstance(step, Quantize) and not (isinstance(step, Train) and step.keeps_factors):
            raise ValueError(
                f"what step {factoring[0]} factors, {step.method} would not keep: let it come before that, or leave it "
                "out; of the steps that train, `full` and distillations learn in the place of factors, and a step "
                "that quantizes may come last"
            )


def _trains_on_examples(steps: Sequence[Step], text: Text) -> None:
    for step in steps:
        if not isinstance(step, Train):
            continue
        if isinstance(step, Finetune) and text != "named":
            raise ValueError(
                f"{step.method} learns from examples: name a file (file-…) or a dataset (hub:…) as data.source"
            )
        if step is not steps[-1] and isinstance(step, Adapters) and not step.mergeable:
            raise ValueError(
                f"what {step.method} learns can't be merged into weights that a step goes on with: let it be the "
                "last step"
            )
        if isinstance(step, Distill) and text == "own":
            raise ValueError("a student learns from text that is there: name a file or a dataset as data.source")
        if step is not steps[-1] and isinstance(step, Head):
            raise ValueError("head makes a classifier, which no step goes on with: let it be the last step")
        if step is not steps[-1] and not step.whole:
            raise ValueError(f"the step after {step.method} goes on with a whole model: set its `merge` to true")


def _says_who_learns(steps: Sequence[Step]) -> None:
    pruned = False
    for number, step in enumerate(steps):
        if isinstance(step, Distill) and step.student.named == pruned:
            raise ValueError(
                f"steps.{number}: the model that the steps before pruned is who learns: leave `student` out"
                if pruned
                else f"steps.{number}.student: say who learns, either `layers`, so many blocks of the teacher, or "
                "`model`; or let a step before prune the model"
            )
        pruned |= isinstance(step, Zeroes | SVD | Distill) or (isinstance(step, Slim) and not step.equivalent)


def _refuse_unshared_training(step: Train, gpus: int) -> None:
    if gpus <= 1 and step.sharding != "auto":
        raise ValueError(f"sharding {step.sharding!r} says what several GPUs hold: set limits.gpus to 2 or more")
    if gpus > 1 and (step.optimizer != "adamw" or step.precision == "fp16"):
        what = step.optimizer if step.optimizer != "adamw" else "fp16"
        raise ValueError(f"{what} is computed on one GPU alone: set limits.gpus to 1")
    if isinstance(step, QLoRA) and step.sharding not in ("auto", "ddp"):
        raise ValueError(
            f"rounded weights are whole on every GPU, and {step.sharding} would take them apart: set sharding to ddp"
        )
    if isinstance(step, Hidden | OnPolicy) and step.sharding not in ("auto", "ddp"):
        raise ValueError(
            f"the teacher of {step.method} stands whole on every GPU, beside a student that does too: set sharding to "
            "ddp, or take the method logits"
        )
    if gpus > 1 and step.micro_batch_size == "auto":
        raise ValueError("micro_batch_size `auto` is tried on one GPU: set limits.gpus to 1, or say a number")
    if step.batch_size != "auto" and gpus > step.batch_size:
        raise ValueError(f"a batch of {step.batch_size} sequences can't be dealt out to {gpus} GPUs: make it larger")
    if step.sharding == "hybrid" and gpus % 2:
        raise ValueError(f"sharding `hybrid` makes two groups of equal size: {gpus} GPUs can't be halved")
