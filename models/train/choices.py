"""What `"auto"` comes to for one training: by the rules of `squeeze.specs.choosing`, from the examples, the model and
the memory that is there; chosen once, and kept beside the checkpoints, so that every attempt goes on with the same.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from models.files.checkpoint import SourceModel
from models.progress import Notify
from models.resources import available_device_bytes, peak_host_bytes, return_free_memory
from models.train.checkpoints import random_tensors, restore_random
from models.train.packing import batch_of
from models.train.task import Task
from squeeze import __version__
from squeeze.costs.trainable import learned
from squeeze.costs.training_memory import needed_to_train
from squeeze.specs.choosing import Choice, batch_for, length_for, micro_batch_for, rate_for, settled
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.finetuning import Finetune

FILE = "choices.json"


@dataclass
class Choices:
    """asked: a digest of what they depend on. kept: of an earlier attempt, or of the process that leads. made: in this
    one, in their order.
    """

    asked: str
    kept: Sequence[Choice] = ()
    made: list[Choice] = field(default_factory=list)

    @classmethod
    def of(cls, spec: JobSpec, step: Finetune, directory: Path, kept: Sequence[Choice] | None = None) -> "Choices":
        """directory: of the training. kept: None: what an earlier attempt left there."""
        parts = [spec.data.sequence_length, spec.limits.gpus, step.model_dump(mode="json"), __version__]
        asked = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        file = directory / FILE
        if kept is None and file.is_file():
            told = json.loads(file.read_text(encoding="utf-8"))
            kept = [Choice.model_validate(one) for one in told["choices"]] if told["asked"] == asked else ()
        return cls(asked, kept or ())

    @property
    def notes(self) -> dict[str, str]:
        """As a file that goes with the checkpoints."""
        choices = [one.model_dump() for one in self.made]
        return {FILE: json.dumps({"asked": self.asked, "choices": choices})} if choices else {}

    def take(self, name: str, found: Callable[[], Choice]) -> Choice:
        """What was chosen before, or else what is found now."""
        choice = next((one for one in self.kept if one.name == name), None) or found()
        self.made.append(choice)
        return choice

    def replace(self, choice: Choice) -> None:
        self.made = [choice if one.name == choice.name else one for one in self.made]


def choose_length(choices: Choices, spec: JobSpec, lengths: Callable[[], Sequence[int]], most: int) -> int:
    """Of a sequence, in tokens. lengths: of the examples, where they may be as long as `most`."""
    if spec.data.sequence_length != "auto":
        return min(spec.data.sequence_length, most)
    return int(choices.take("sequence_length", lambda: length_for(lengths(), most)).value)


def choose_rest(
    choices: Choices, spec: JobSpec, step: Finetune, source: SourceModel, tokens: int, length: int, device: torch.device
) -> tuple[JobSpec, Finetune]:
    """The job and its step with a number for each `auto`. tokens: of the training examples. Of the micro-batch it is
    what memory should hold, still to be tried: on a GPU a whole batch.
    """
    if step.learning_rate == "auto":
        choices.take("learning_rate", lambda: rate_for(step, source.parameters))
    if step.batch_size == "auto":
        gpus = max(1, spec.limits.gpus)
        choices.take("batch_size", lambda: batch_for(length, max(1, tokens // length), gpus))
    known, chosen = settled(spec, step, choices.made)
    if step.micro_batch_size == "auto":
        choices.take("micro_batch_size", lambda: _micro_batch(known, chosen, source, device))
    return settled(spec, step, choices.made)


def try_micro_batch(
    choices: Choices, task: Task, accelerator: Accelerator, source: SourceModel, notify: Notify
) -> int | None:
    """The size of a micro-batch for which there is memory, found by going forwards and backwards with the fullest
    sequences; None where it was not to be found, or was by an earlier attempt. Leaves no trace in the model, nor in
    the random numbers.
    """
    choice = next((one for one in choices.made if one.name == "micro_batch_size"), None)
    if choice is None or choice in choices.kept:
        return None
    assert isinstance(task.step, Finetune), "only these choose"
    size, where = int(choice.value), "the GPU" if task.device.type == "cuda" else "host memory"
    before, free = peak_host_bytes(), available_device_bytes(task.device)
    random = random_tensors(task.device)
    state = learned(task.step, source.config, {name: one.shape for name, one in source.entries.items()}).state_bytes
    while not _fits(task, accelerator, size, state, before + free) and size > 1:
        size //= 2
    restore_random(random, task.device)
    why = f"tried: a step with {size} of the fullest sequences fits {where}"
    why += f", twice as many don't; {choice.why}" if size < choice.value else f"; {choice.why}"
    choices.replace(choice.model_copy(update={"value": size, "why": why}))
    notify.event("info", f"micro_batch_size {size}: {why}")
    return size


def _micro_batch(spec: JobSpec, step: Finetune, source: SourceModel, device: torch.device) -> Choice:
    if device.type == "cuda":
        size = 1 << (step.sequences.bit_length() - 1)
        return Choice(name="micro_batch_size", value=size, why="a power of two, at most a batch")
    shape, known = source.shape(), learned(step, source.config, {n: one.shape for n, one in source.entries.items()})

    def needed(size: int) -> int:
        memory = needed_to_train(shape, spec, step.model_copy(update={"micro_batch_size": size}), known, {})
        return memory.job - memory.process

    return micro_batch_for(step.sequences, needed, available_device_bytes(device))


def _fits(task: Task, accelerator: Accelerator, size: int, state_bytes: int, most_host_bytes: int) -> bool:
    """Whether a step with so many sequences finds its memory, beside the optimizer's state. most_host_bytes: that this
    process may come to, on the CPU, where nobody says so before it is killed.
    """
    rows = sorted(task.plan.rows, key=lambda row: -sum(len(task.examples.one(number)[0]) for number in row))[:size]
    task.model.train()
    held: list[Tensor] = []
    try:
        if task.device.type == "cuda":
            held.append(torch.empty(state_bytes, dtype=torch.uint8, device=task.device))
        with accelerator.autocast():
            losses = task.objective(task.model, batch_of(task.examples, rows).to(task.device), packed=task.packed)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        return False
    finally:
        held.clear()
        for one in task.learning.values():
            one.grad = None
        if task.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            return_free_memory()
    return task.device.type == "cuda" or peak_host_bytes() <= most_host_bytes
