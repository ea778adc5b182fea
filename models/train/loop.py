"""The training loop: batch after batch until the planned steps are done, or the held-out loss falls no more.

Every number that it draws or adds up is the same on the same device whether it runs through or was stopped in between.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from models.progress import Notify
from models.resources import peak_gpu_bytes, peak_host_bytes
from models.train.checkpoints import (
    Checkpoints,
    Story,
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
)
from models.train.examples import Examples
from models.train.packing import Batch, Plan, Row, batch_of, micro_batches
from models.train.schedule import learning_rate, warmup_steps
from models.train.scoring import Objective, example_losses, learned_losses, without_virtual_tokens
from squeeze.errors import NotFinite
from squeeze.report import HeldOutLoss, TrainingStep
from squeeze.training import Train

SNAPSHOT_SHARE = 0.1  # of the time that may go into checkpoints before `snapshot_seconds` are over
TOLD_SECONDS = 1.0  # between two events
BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Task:
    """model: on its device, with what is to learn in float32. held_out: empty where nobody looks at their loss.
    packed: rows hold several examples each. objective: what falls; the held-out loss is the negative log-likelihood
    whatever it is. beside: learns too, and is worth nothing once the training is over.
    """

    model: Any
    step: Train
    examples: Examples
    plan: Plan
    held_out: Examples
    held_out_rows: Sequence[Row]
    packed: bool
    device: torch.device
    objective: Objective = learned_losses
    beside: nn.Module | None = None

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        own = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        more = {} if self.beside is None else {f"beside.{name}": one for name, one in self.beside.named_parameters()}
        return own | more

    def held_out_losses(self, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """As `example_losses`."""
        with accelerator.autocast():
            return example_losses(
                self.model,
                self.held_out,
                self.held_out_rows,
                packed=self.packed,
                size=self.step.micro_batch_size,
                device=self.device,
            )


def accelerator_of(precision: str, device: torch.device) -> Accelerator:
    """For one process on one device. Its state is the process's: a job that trains twice sets it anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, device_placement=False)


def train(
    task: Task, accelerator: Accelerator, checkpoints: Checkpoints, notify: Notify, snapshot_seconds: float
) -> Story:
    """Trains the model in place and leaves in it the weights that are to be kept: where looks at the held-out loss were
    asked for those of the lowest, else the last.

    A checkpoint is saved every `snapshot_seconds` at the latest, and when the process is asked to end (SIGTERM), which
    it then does. Raises NotFinite, naming the step, where the loss or the gradient is no number.
    """
    run = _Run(task, accelerator, checkpoints, notify)
    run.resume()
    if not run.story.held_out:
        run.look()
    notify.advance(run.story.done, task.plan.steps, "steps")
    with _asked_to_end() as asked:
        saved_at, cost = time.monotonic(), 0.0
        while run.story.stopped is None and run.story.done < task.plan.steps:
            finished = run.gradient(asked)
            began = time.monotonic()
            # Only weights that have given a finite loss are kept: those from before the step.
            if not finished or began - saved_at >= min(snapshot_seconds, cost / SNAPSHOT_SHARE):
                run.save()
                saved_at, cost = time.monotonic(), time.monotonic() - began
            if not finished:
                break
            run.descend()
        ends = asked.is_set()
    if ends:
        os.kill(os.getpid(), signal.SIGTERM)  # what was to happen before we asked for a moment
        raise SystemExit(128 + signal.SIGTERM)
    if run.story.held_out and run.story.held_out[-1].step != run.story.done:
        run.look()
    run.save()
    run.keep_the_best()
    run.tell(whole=True)
    return run.story


class _Run:
    """One training between two steps."""

    def __init__(self, task: Task, accelerator: Accelerator, checkpoints: Checkpoints, notify: Notify) -> None:
        self._task, self._accelerator, self._checkpoints, self._notify = task, accelerator, checkpoints, notify
        self._learning = task.learning
        step = task.step
        self._optimizer = torch.optim.AdamW(
            self._learning.values(),
            lr=step.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=step.weight_decay,
        )
        self._warmup = warmup_steps(step.warmup, task.plan.steps)
        self._best: dict[str, Tensor] = {}
        self._random = random_tensors(task.device)
        self._now: dict[str, float] = {}
        self._told, self._told_at = 0, 0.0
        self.story = Story()

    def resume(self) -> None:
        found = self._checkpoints.latest()
        if found is None:
            return
        self.story, tensors = found
        with torch.no_grad():
            for name, parameter in self._learning.items():
                parameter.copy_(tensors[f"learned.{name}"])
        self._best = {name: tensors[f"best.{name}"] for name in self._learning if f"best.{name}" in tensors}
        restore_optimizer(self._optimizer, tensors)
        restore_random(tensors, self._task.device)
        self._random = random_tensors(self._task.device)
        self.story.resumed.append(self.story.done)
        self._told = self.story.done
        self._notify.event(
            "info",
            f"going on after step {self.story.done} of {self._task.plan.steps}, which an earlier attempt reached",
            step=self.story.done,
        )

    def gradient(self, asked: threading.Event) -> bool:
        """Forward and backward of the next batch; False where we are asked to end half way. Raises NotFinite."""
        task, number = self._task, self.story.done
        began, self._random = time.monotonic(), random_tensors(task.device)
        parts = [
            batch_of(task.examples, rows) for rows in micro_batches(task.plan.batch(number), task.step.micro_batch_size)
        ]
        learned = sum(part.learned for part in parts)
        task.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for n, part in enumerate(parts, start=1):
            if asked.is_set():
                return False
            total += self._part(part.to(task.device), learned, last=n == len(parts))
        self._refuse_no_number(total, "loss")
        limit = math.inf if task.step.clip_norm is None else task.step.clip_norm
        norm = float(self._accelerator.clip_grad_norm_([*self._learning.values()], limit))
        self._refuse_no_number(norm, "gradient's norm")
        tokens = sum(int((part.owners >= 0).sum()) for part in parts)
        self._now = {"loss": total, "norm": norm, "tokens": tokens, "began": began}
        return not asked.is_set()

    def _part(self, batch: Batch, learned: int, *, last: bool) -> float:
        """Adds the gradient of a part of a batch that has so many learned tokens in all; its share of the loss."""
        model, accelerator = self._task.model, self._accelerator
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                losses = self._task.objective(model, batch, packed=self._task.packed)
            loss = losses.sum() / learned
            accelerator.backward(loss)
        return float(loss.detach())

    def descend(self) -> None:
        """The step itself, and a look at the held-out loss where one is due."""
        task, number = self._task, self.story.done
        step = task.step
        rate = learning_rate(step.learning_rate, step.schedule, number, task.plan.steps, self._warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.story.curve.append(
            TrainingStep(
                step=number + 1,
                loss=self._now["loss"],
                learning_rate=rate,
                gradient_norm=self._now["norm"],
                tokens=int(self._now["tokens"]),
                seconds=round(time.monotonic() - self._now["began"], 6),
                peak_host_bytes=peak_host_bytes(),
                peak_gpu_bytes=peak_gpu_bytes(),
            )
        )
        self._random = random_tensors(task.device)
        self._notify.advance(self.story.done, task.plan.steps, "steps")
        self.tell()
        if step.evaluate_every is not None and self.story.done % step.evaluate_every == 0:
            self.look()
            self._stop_where_it_falls_no_more()

    def look(self) -> None:
        """Measures the held-out loss, if there are examples for that."""
        if not len(self._task.held_out):
            return
        with nullcontext() if self.story.done else without_virtual_tokens(self._task.model):  # at first as it came
            sums, counts = self._task.held_out_losses(self._accelerator)
        found = HeldOutLoss(step=self.story.done, loss=float(sums.sum() / counts.sum()))
        best = self.story.best
        self.story.held_out.append(found)
        if self._task.step.evaluate_every is not None and found.step and (best is None or found.loss < best.loss):
            self._best = {name: one.detach().clone() for name, one in self._learning.items()}
        self._notify.event(
            "info", f"held-out loss after {found.step} steps: {found.loss:.4f}", step=found.step, loss=found.loss
        )

    def _stop_where_it_falls_no_more(self) -> None:
        patience, best = self._task.step.patience, self.story.best
        assert best is not None, "it was looked at"
        since = sum(1 for one in self.story.held_out if one.step > best.step)
        if patience is not None and since >= patience:
            self.story.stopped = (
                f"the held-out loss was lowest after step {best.step}, and no lower in the {since} looks after that"
            )

    def save(self) -> None:
        """As it stood when the next step began."""
        self._checkpoints.save(
            self.story,
            {f"learned.{name}": one for name, one in self._learning.items()}
            | {f"best.{name}": one for name, one in self._best.items()}
            | optimizer_tensors(self._optimizer)
            | self._random,
        )

    def keep_the_best(self) -> None:
        with torch.no_grad():
            for name, best in self._best.items():
                self._learning[name].copy_(best)

    def tell(self, *, whole: bool = False) -> None:
        """Events of the steps since the last one, not more often than once a second."""
        now, new = time.monotonic(), self.story.curve[self._told :]
        if not new or (now - self._told_at < TOLD_SECONDS and not whole):
            return
        last, seconds = new[-1], sum(one.seconds for one in new)
        speed = sum(one.tokens for one in new) / max(seconds, 1e-9)
        self._notify.event(
            "info",
            f"step {last.step} of {self._task.plan.steps}: loss {last.loss:.4f}, learning rate "
            f"{last.learning_rate:.3g}, {speed:,.0f} tokens/s",
            steps=[one.model_dump() for one in new],
            tokens_per_second=round(speed, 1),
        )
        self._told, self._told_at = self.story.done, now

    def _refuse_no_number(self, value: float, what: str) -> None:
        if math.isfinite(value):
            return
        kept = self._checkpoints.last_step
        left = "no checkpoint had been saved yet" if kept is None else f"the checkpoint after step {kept} is kept"
        raise NotFinite(
            f"the {what} became {value} at step {self.story.done + 1} of the training; {left}. Take a lower "
            "learning_rate, a longer warmup, a lower clip_norm, or precision fp32."
        )


@contextmanager
def _asked_to_end() -> Iterator[threading.Event]:
    """Set once a SIGTERM came; it takes effect after this block."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread alone
        yield asked
        return

    def note(_: int, __: FrameType | None) -> None:
        asked.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
