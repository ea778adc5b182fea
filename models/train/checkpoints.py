"""What is kept of a training on the way: everything that the next step depends on, so that another attempt goes on to
the same bits.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.files.disk import write_whole
from models.formats.shards import Piece, write_pieces
from models.streaming.team import SOLO, Team
from models.train.processes import whole
from models.train.zero import Part
from squeeze.reports.training import HeldOutLoss, TrainingStep

TENSORS, STORY, MARK = "state.safetensors", "state.json", "fingerprint"


@dataclass
class Story:
    """What was seen so far, and where the random numbers stood when the next step began."""

    curve: list[TrainingStep] = field(default_factory=list)
    held_out: list[HeldOutLoss] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    stopped: str | None = None

    @property
    def done(self) -> int:
        """Steps."""
        return len(self.curve)

    def best(self, since: int = 1) -> HeldOutLoss | None:
        """The first of the lowest, after so many steps or more."""
        return min((one for one in self.held_out if one.step >= since), key=lambda one: one.loss, default=None)


class Checkpoints:
    """The work directory of one training; what another one left in it is deleted.

    fingerprint: of all that decides the result. team: of the processes that share it. The leader writes whole tensors,
    so that as many or fewer or more can go on from them. notes: texts by the names of files, which go with the
    checkpoints wherever they go.
    """

    def __init__(
        self, directory: Path, fingerprint: str, team: Team = SOLO, notes: Mapping[str, str] | None = None
    ) -> None:
        self.directory, self._team = directory, team
        self._notes = {**(notes or {}), MARK: fingerprint}
        if not team.leads:
            return
        mark = directory / MARK
        if directory.exists() and (not mark.is_file() or mark.read_text() != fingerprint):
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in self._notes.items():
            write_whole(directory / name, text)

    def save(self, story: Story, tensors: Mapping[str, Tensor | Part]) -> Path | None:
        """The new one is complete before the old one goes. One tensor at a time is put together from its parts. Where
        it lies; None for those that don't lead.
        """
        if not self._team.leads:
            for tensor in tensors.values():
                whole(tensor.detach())
            self._team.meet("the checkpoint")
            return None
        target = self.directory / f"checkpoint-{story.done:08d}"
        part = self.directory / "checkpoint.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for _ in write_pieces(part / TENSORS, [_piece(name, tensor.detach()) for name, tensor in tensors.items()]):
            pass
        told = {
            "curve": [one.model_dump() for one in story.curve],
            "held_out": [one.model_dump() for one in story.held_out],
            "resumed": story.resumed,
            "stopped": story.stopped,
        }
        (part / STORY).write_text(json.dumps(told), encoding="utf-8")
        for name, text in self._notes.items():
            (part / name).write_text(text, encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        self._forget_but(target)
        self._team.meet("the checkpoint")
        return target

    def latest(self) -> tuple[Story, dict[str, Tensor]] | None:
        """What was saved last; None where nothing was."""
        name = self._team.tell(max((path.name for path in self.directory.glob("checkpoint-*[0-9]")), default=None))
        if name is None:
            return None
        found = self.directory / name
        if self._team.leads:
            self._forget_but(found)
        told = json.loads((found / STORY).read_text(encoding="utf-8"))
        story = Story(
            [TrainingStep.model_validate(one) for one in told["curve"]],
            [HeldOutLoss.model_validate(one) for one in told["held_out"]],
            told["resumed"],
            told["stopped"],
        )
        return story, load_file(found / TENSORS)

    @property
    def last_step(self) -> int | None:
        """After which the last one was saved."""
        found = sorted(self.directory.glob("checkpoint-*[0-9]"))
        return int(found[-1].name.rpartition("-")[2]) if found else None

    def _forget_but(self, kept: Path) -> None:
        for old in self.directory.glob("checkpoint-*[0-9]"):
            if old != kept:
                shutil.rmtree(old)


def adopt(checkpoint: Path, brought: Path) -> None:
    """Puts a checkpoint that was saved elsewhere, and lies on this disk, where `Checkpoints` will look for it."""
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    checkpoint.parent.mkdir(parents=True)
    for path in brought.iterdir():
        if path.name not in (TENSORS, STORY):
            shutil.copyfile(path, checkpoint.parent / path.name)
    brought.rename(checkpoint)


def _piece(name: str, tensor: Tensor | Part) -> Piece:
    return Piece({name: (tensor.dtype, tuple(tensor.shape))}, lambda: {name: whole(tensor)})


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """Where the random numbers of this process stand."""
    found = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["random.cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore_random(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
