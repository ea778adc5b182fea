"""What is kept in a quantize step's work directory: the codes of finished blocks, and how far the activations came."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from models.resources import return_free_memory
from models.streaming.streams import Room, Stream
from models.streaming.team import SOLO, Team
from squeeze.reports.report import Block

SNAPSHOT_SECONDS = 30.0
SNAPSHOT_SHARE = 0.1  # of the time that may go into snapshots before that
STREAMS = ("calibration", "original", "compressed", "uncompressed")


@dataclass
class Activations:
    """Hidden states before the next block.

    calibration: made by compressed blocks. original, compressed: the evaluation windows through either model.
    uncompressed: the calibration set through the model as it is, for methods that work on whole blocks; else empty.
    """

    calibration: Stream
    original: Stream
    compressed: Stream
    uncompressed: Stream

    def release(self) -> None:
        """Gives the memory back: what comes after the evaluation, the certifier above all, can use it."""
        for stream in (self.calibration, self.original, self.compressed, self.uncompressed):
            stream.clear()
        return_free_memory()


class Snapshots:
    """The work directory of one recipe; what another recipe, or a team of another size, left in it is deleted.

    directory: of the finished blocks' codes, which the team's leader writes. own: of this process's snapshots and
    activations; the leader's own is the directory itself.
    """

    def __init__(self, directory: Path, fingerprint: str, team: Team = SOLO) -> None:
        self.directory, self._team = directory, team
        self.own = directory if team.leads else directory / f"process-{team.rank}"
        if team.leads:
            mark = directory / "fingerprint"
            expected = fingerprint if team.size == 1 else f"{fingerprint} by {team.size}"
            if directory.exists() and (not mark.is_file() or mark.read_text() != expected):
                shutil.rmtree(directory)
            directory.mkdir(parents=True, exist_ok=True)
            mark.write_text(expected)
        team.meet("the work directory")
        self.own.mkdir(exist_ok=True)

    def save(self, done: int, blocks: list[Block], activations: Activations) -> None:
        """After `done` blocks. The new one is complete, on every process, before the old one goes on any."""
        target = self._snapshot(done)
        part = self.own / "snapshot.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name in STREAMS:
            getattr(activations, name).save(part / name)
        (part / "blocks.json").write_text(json.dumps([block.model_dump() for block in blocks]))
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        self._team.meet(target.name)
        self._forget_but(target)

    def resume(self, room: Room) -> tuple[list[Block], Activations] | None:
        """(stories of the blocks done, activations after them) of the latest snapshot that every process has; None
        where there is none.
        """
        held = self._team.gather([int(path.name.split("-")[1]) for path in self.own.glob("snapshot-*[0-9]")])
        common = set(held[0]).intersection(*held)
        if not common:
            return None
        latest = self._snapshot(max(common))
        self._forget_but(latest)
        blocks = [Block.model_validate(one) for one in json.loads((latest / "blocks.json").read_text())]
        return blocks, Activations(*(Stream.saved(room, latest / name) for name in STREAMS))

    def _snapshot(self, done: int) -> Path:
        return self.own / f"snapshot-{done:05d}"

    def _forget_but(self, kept: Path) -> None:
        for old in self.own.glob("snapshot-*[0-9]"):
            if old != kept:
                shutil.rmtree(old)
