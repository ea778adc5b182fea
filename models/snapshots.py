"""What is kept in a quantize step's work directory: the codes of finished blocks, and how far the activations came."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from models.resources import return_free_memory
from models.streams import Room, Stream
from squeeze.report import Block

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
    """The work directory of one recipe; what another recipe left in it is deleted."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        mark = directory / "fingerprint"
        if directory.exists() and (not mark.is_file() or mark.read_text() != fingerprint):
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        mark.write_text(fingerprint)

    def save(self, done: int, blocks: list[Block], activations: Activations) -> None:
        """After `done` blocks. The new one is complete before the old one goes."""
        target = self.directory / f"snapshot-{done:05d}"
        part = self.directory / "snapshot.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name in STREAMS:
            getattr(activations, name).save(part / name)
        (part / "blocks.json").write_text(json.dumps([block.model_dump() for block in blocks]))
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in self.directory.glob("snapshot-*"):
            if old != target:
                shutil.rmtree(old)

    def resume(self, room: Room) -> tuple[list[Block], Activations] | None:
        """(stories of the blocks done, activations after them) of the latest snapshot; None where there is none."""
        snapshots = sorted(self.directory.glob("snapshot-*[0-9]"))
        if not snapshots:
            return None
        latest = snapshots[-1]
        blocks = [Block.model_validate(one) for one in json.loads((latest / "blocks.json").read_text())]
        return blocks, Activations(*(Stream.saved(room, latest / name) for name in STREAMS))
