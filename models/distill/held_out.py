"""What teacher and student make of the held-out examples: the losses of both, and how far apart they are."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from models.distill.divergence import diverged
from models.distill.teacher import chunks_of, logits_in_slices, places_of, read_chunk
from models.files.disk import write_whole
from models.progress import Notify
from models.resources import return_free_memory
from models.streaming.frame import Frame
from models.train.examples import Examples
from models.train.packing import UNSCORED, batch_of, micro_batches
from models.train.scoring import learned_logits
from models.train.task import Task

HIDDEN, MARK = "held-out.safetensors", "held-out-by"


@dataclass(frozen=True)
class Apart:
    """Means over the held-out learned tokens. divergence: KL(teacher ‖ student), nats, of whole distributions over the
    vocabulary that both know. agreement: share of the tokens where both find the same one likeliest.
    """

    teacher_loss: float
    divergence: float
    agreement: float


def read_held_out(
    frame: Frame,
    examples: Examples,
    directory: Path,
    mark: str,
    notify: Notify,
    memory_bytes: int | None = None,
    later: int = 0,
) -> Tensor:
    """The teacher's last hidden states before each held-out learned token, (n, C), kept between attempts. later: tokens
    that it reads afterwards.
    """
    file, note = directory / HIDDEN, directory / MARK
    if file.is_file() and note.is_file() and note.read_text(encoding="utf-8") == mark:
        kept: Tensor = load_file(file)["hidden"]
        return kept
    directory.mkdir(parents=True, exist_ok=True)
    found: list[tuple[Tensor, Tensor]] = []
    whole = len(examples.ids) + later
    for chunk in chunks_of(examples):
        told = int(examples.starts[chunk.start]), whole
        read_chunk(frame, examples, chunk, lambda *one: found.append(one), directory, notify, memory_bytes, told)
    order = torch.cat([places for places, _ in found]).argsort()
    hidden = torch.cat([some for _, some in found])[order].contiguous()
    save_file({"hidden": hidden}, file)
    write_whole(note, mark)
    return hidden


@torch.no_grad()
def losses_said(frame: Frame, hidden: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, number) of the learned tokens of each example, both (n,) float64, by the teacher.
    hidden: of `read_held_out`.
    """
    owners = torch.arange(len(examples)).repeat_interleave(examples.starts.diff())[examples.scored]
    targets = examples.ids[examples.scored].long()
    sums, counts = (torch.zeros(len(examples), dtype=torch.float64) for _ in range(2))
    with frame.surroundings():
        for part, logits in logits_in_slices(frame, hidden):
            each = F.cross_entropy(logits, targets[part].to(logits.device), reduction="none").double().cpu()
            sums.index_add_(0, owners[part], each)
            counts.index_add_(0, owners[part], torch.ones_like(each))
    return sums, counts


@torch.no_grad()
def apart(task: Task, accelerator: Accelerator, frame: Frame, hidden: Tensor, vocabulary: int) -> Apart:
    """How far the task's model is from the teacher. hidden: of `read_held_out`. vocabulary: ids that both
    know; the rest are what fills a table of embeddings up.
    """
    sums, count = torch.zeros(3, dtype=torch.float64), 0
    places, starts = places_of(task.held_out), task.held_out.starts
    was_training = task.model.training
    task.model.eval()
    return_free_memory()  # of the training, beside which copies of all logits would be the most that there is
    with frame.surroundings():
        for some in micro_batches(task.held_out_rows, task.step.together):
            batch = batch_of(task.held_out, some)
            learned = batch.targets != UNSCORED
            where = places[starts[batch.owners[learned]] + batch.positions[learned] + 1]
            targets = batch.targets[learned].to(task.device)
            with accelerator.autocast():
                student = learned_logits(task.model, batch.to(task.device), packed=task.packed)
            for part, teacher in logits_in_slices(frame, hidden[where]):
                p = teacher[:, :vocabulary].log_softmax(-1)
                q = student[part, :vocabulary].float().log_softmax(-1)
                sums += torch.stack(
                    [
                        F.cross_entropy(teacher, targets[part], reduction="sum").double(),
                        diverged(p, q, "forward_kl", 0.5).sum(dtype=torch.float64),
                        (p.argmax(-1) == q.argmax(-1)).sum().double(),
                    ]
                ).cpu()
            count += len(targets)
    task.model.train(was_training)
    loss, divergence, agreement = (sums / count).tolist()
    return Apart(loss, max(divergence, 0.0), agreement)
