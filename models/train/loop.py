"""The training loop: batch after batch until the planned steps are done, or the held-out loss falls no more.

Every number that it draws or adds up is the same on the same device whether it runs through or was stopped in between.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from models.progress import Notify
from models.resources import peak_gpu_bytes, peak_host_bytes
from models.train.averages import Averages, copied, put
from models.train.checkpoints import Checkpoints, Story, random_tensors, restore_random
from models.train.domains import weights_told
from models.train.optimizers import BAdam, optimizer_of, optimizer_tensors, restore_optimizer
from models.train.packing import Batch
from models.train.processes import whole
from models.train.schedule import learning_rate, warmup_steps
from models.train.scoring import Turning, without_virtual_tokens
from models.train.task import Task
from models.train.zero import Part
from models.train.zeros import put_back, still_gradients
from squeeze.errors import NotFinite
from squeeze.reports.training import HeldOutLoss, TrainingStep

SNAPSHOT_SHARE = 0.1  # of the time that may go into checkpoints before `snapshot_seconds` are over
TOLD_SECONDS = 1.0  # between two events
SMALLEST_SCALE = 1.0  # of a loss in fp16; a gradient that is too large even so is no matter of precision


def train(
    task: Task, accelerator: Accelerator, checkpoints: Checkpoints, notify: Notify, snapshot_seconds: float
) -> Story:
    """Trains the model in place and leaves in it the weights that are to be kept: where looks at the held-out loss were
    asked for those of the lowest, else the last. Of several processes each has its part.

    A checkpoint is saved every `snapshot_seconds` at the latest, and when the process is asked to end (SIGTERM), which
    it then does. Raises NotFinite, naming the step, where the loss or the gradient is no number.
    """
    run, processes = _Run(task, accelerator, checkpoints, notify), task.processes
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
            due = began - saved_at >= min(snapshot_seconds, cost / SNAPSHOT_SHARE)
            if not finished or processes.leader_says(due):
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
        self._learning, self._called = task.learning, task.processes.called(task.model)
        step, self._zero = task.step, task.processes.zero
        self._optimizer = optimizer_of(step, self._learning) if self._zero is None else self._zero.optimizer
        self._held: Mapping[str, Tensor] = self._learning if self._zero is None else self._zero.held
        self._averages = Averages(self._held, step.ema)
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
        self.story, tensors = found[0], self._task.processes.spread(found[1], self._learning)
        with torch.no_grad():
            for name, held in self._held.items():
                held.copy_(tensors[f"learned.{name}"])
        for name, average in self._averages.tensors.items():
            average.copy_(tensors[f"averaged.{name}"])
        if (scaler := self._accelerator.scaler) is not None:
            scaler.load_state_dict(
                scaler.state_dict()
                | {"scale": float(tensors["scale"]), "_growth_tracker": int(tensors["scale.tracker"])}
            )
        self._best = {name: tensors[f"best.{name}"] for name in self._learning if f"best.{name}" in tensors}
        if self._zero is None:
            restore_optimizer(self._optimizer, tensors)
        else:
            self._zero.restore(tensors)
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
        task, number, processes = self._task, self.story.done, self._task.processes
        began, self._random = time.monotonic(), random_tensors(task.device)
        processes.draw(task.plan.seed, number)
        if isinstance(task.objective, Turning):
            task.objective.turn_to(task.plan.seed, number)
        rows = task.plan.batch(number) if task.domains is None else task.domains.batch(number, self.story.held_out)
        parts = processes.batches(task.examples, rows, task.step.micro)
        learned, tokens = processes.total(sum(one.learned for one in parts), sum(one.tokens for one in parts))
        if isinstance(self._optimizer, BAdam):
            self._optimizer.turn_to(number)
        task.model.train()
        while True:
            with task.masks.in_place(number):
                share = self._gradient_of(parts, learned, asked)
            if share is None:
                return False
            (total,) = processes.total(share)
            self._refuse_no_number(total, "loss")
            self._accelerator.unscale_gradients(self._optimizer)
            task.masks.straight_through()
            still_gradients(self._learning, task.zeros)
            norm = self._clipped() if self._zero is None else self._zero.norm()
            if math.isfinite(norm) or not self._scale_down():
                break
        self._refuse_no_number(norm, "gradient's norm")
        self._now = {"loss": total, "norm": norm, "tokens": tokens, "began": began}
        return not processes.agree(asked)

    def _clipped(self) -> float:
        """The gradient's norm; it is clipped."""
        limit = math.inf if self._task.step.clip_norm is None else self._task.step.clip_norm
        return float(whole(self._accelerator.clip_grad_norm_([*self._learning.values()], limit)))

    def _gradient_of(self, parts: Sequence[Batch], learned: float, asked: threading.Event) -> float | None:
        """This process's share of the loss of a batch, whose gradient is there then; None where we are asked to end."""
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for n, part in enumerate(parts, start=1):
            if self._task.processes.agree(asked):
                return None
            total += self._part(part.to(self._task.device), learned, last=n == len(parts))
        self._task.processes.average(self._task.beside)
        return total

    def _scale_down(self) -> bool:
        """After a gradient that fp16 can't hold: a smaller scale of the loss, and the same batch once more, with the
        same random numbers. False where there is no smaller one.
        """
        scaler = self._accelerator.scaler
        if scaler is None or scaler.get_scale() < SMALLEST_SCALE:
            return False
        scaler.update()
        restore_random(self._random, self._task.device)
        return True

    def _part(self, batch: Batch, learned: float, *, last: bool) -> float:
        """Adds the gradient of a part of a batch that has so many learned tokens in all; its share of the loss."""
        accelerator, processes = self._accelerator, self._task.processes
        with processes.adding_up(self._called, last=last):
            with accelerator.autocast():
                losses = self._task.objective(self._called, batch, packed=self._task.packed)
            loss = losses.sum() / learned
            accelerator.backward(loss * processes.size)  # the average of which is taken
        return float(loss.detach())

    def descend(self) -> None:
        """The step itself, and a look at the held-out loss where one is due."""
        task, number = self._task, self.story.done
        step = task.step
        rate = learning_rate(step.rate, step.schedule, number, task.plan.steps, self._warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group.get("times", 1.0)
        self._take_step()
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

    def _take_step(self) -> None:
        scaler = self._accelerator.scaler
        if self._zero is not None:
            self._zero.step()
        elif scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)
            scaler.update()
        put_back(self._learning, self._task.zeros)
        self._averages.add(self.story.done + 1)

    def look(self) -> None:
        """Measures the held-out loss, if there are examples for that; with averaged weights where they are averaged."""
        if not len(self._task.held_out):
            return
        came = nullcontext() if self.story.done else without_virtual_tokens(self._task.model)
        masks = self._task.masks
        with self._averages.in_place(), masks.in_place(self.story.done), came:
            sums, counts = self._task.held_out_losses(self._accelerator)
        if (domains := self._task.domains) is None:
            found = HeldOutLoss(step=self.story.done, loss=float(sums.sum() / counts.sum()))
        else:
            found = domains.look(self.story.done, self._task.held_out, (sums, counts), self.story.held_out)
        found = found.model_copy(update={"sparsity": masks.share(self.story.done)})
        self.story.held_out.append(found)
        if self._task.step.evaluate_every is not None and self.story.best(masks.final) is found:
            self._best = copied(self._held if not self._averages.tensors else self._averages.tensors)
        self._notify.event(
            "info",
            f"held-out loss after {found.step} steps: {found.loss:.4f}{weights_told(found)}",
            **found.model_dump(exclude_none=True),
        )

    def _stop_where_it_falls_no_more(self) -> None:
        patience, best = self._task.step.patience, self.story.best(self._task.masks.final)
        if best is None:
            return
        since = sum(1 for one in self.story.held_out if one.step > best.step)
        if patience is not None and since >= patience:
            self.story.stopped = (
                f"the held-out loss was lowest after step {best.step}, and no lower in the {since} looks after that"
            )

    def save(self) -> None:
        """As it stood when the next step began."""
        weights = {
            **{f"learned.{name}": one for name, one in self._held.items()},
            **{f"best.{name}": one for name, one in self._best.items()},
            **{f"averaged.{name}": one for name, one in self._averages.tensors.items()},
        }
        if self._zero is None:
            kept: Mapping[str, Tensor | Part] = weights | optimizer_tensors(self._optimizer)
        else:
            kept = self._zero.parts(weights) | self._zero.optimizer_parts()
        place = self._checkpoints.save(self.story, {**kept, **self._scale_tensors(), **self._random})
        if place is not None:
            self._notify.kept(place)

    def _scale_tensors(self) -> dict[str, Tensor]:
        """Of the loss, with fp16."""
        if self._accelerator.scaler is None:
            return {}
        state = self._accelerator.scaler.state_dict()
        return {"scale": torch.tensor(state["scale"]), "scale.tracker": torch.tensor(state["_growth_tracker"])}

    def keep_the_best(self) -> None:
        if isinstance(self._optimizer, BAdam):
            self._optimizer.release()
        put(self._held, self._best or self._averages.tensors)
        self._task.masks.settle()

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
