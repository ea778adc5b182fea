"""What the teacher says of every learned token, on disk: the likeliest tokens with their probabilities, and the rest's.

Written once, before the training; mapped while it runs, so that memory is the page cache's.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.distill.divergence import in_buckets
from models.distill.teacher import chunks_of, logits_in_slices, places_of, read_chunk
from models.files.disk import write_whole
from models.progress import Notify
from models.streaming.frame import Frame
from models.train.examples import Examples
from models.train.packing import UNSCORED, Batch
from squeeze.errors import NotFinite
from squeeze.steps.distillation import NARROW_IDS, stored_bytes_per_token

IDS, LOGS, STORY = "ids.bin", "logs.bin", "story.json"
# Of a mass that float32 can't tell from nothing beside 1: what is less is taken to be so much.
LEAST_LOG = -24 * math.log(2)


@dataclass(frozen=True)
class Shape:
    """tokens: that are learned. kept: likeliest tokens of each. vocabulary: ids that both models know."""

    tokens: int
    kept: int
    vocabulary: int

    @property
    def id_type(self) -> type[np.unsignedinteger[Any]]:
        return np.uint16 if self.vocabulary <= NARROW_IDS else np.uint32

    @property
    def bytes_per_token(self) -> int:
        return stored_bytes_per_token(self.kept, self.vocabulary)


class Stored:
    """What is kept in a directory. ids: (N, k), the likeliest first. logs: (N, k + 1) float16, natural logarithms of
    their probabilities and of the mass of all others, which is no less than exp(LEAST_LOG).
    """

    def __init__(self, directory: Path, shape: Shape, examples: Examples, mode: str = "r") -> None:
        self.shape, self._starts, self._places = shape, examples.starts, places_of(examples)
        how: Any = mode
        self._ids = np.memmap(directory / IDS, shape.id_type, how, shape=(shape.tokens, shape.kept))
        self._logs = np.memmap(directory / LOGS, np.float16, how, shape=(shape.tokens, shape.kept + 1))

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(ids (n, k) int64, log-probabilities (n, k + 1) float32, which sum to 1) of a batch's learned tokens, in its
        order.
        """
        learned = (batch.targets != UNSCORED).cpu()
        owners, positions = batch.owners.cpu()[learned], batch.positions.cpu()[learned]
        places = self._places[self._starts[owners] + positions + 1].numpy()
        ids = torch.from_numpy(self._ids[places].astype(np.int64))
        logs = torch.from_numpy(self._logs[places].astype(np.float32))
        device = batch.ids.device
        return ids.to(device), logs.to(device).log_softmax(-1)  # float16 rounded each by itself

    def put(self, places: Tensor, logits: Tensor) -> None:
        """logits: (n, V) float32 of the learned tokens at these places."""
        ids = logits.topk(self.shape.kept, dim=-1).indices
        logs = in_buckets(logits, ids).clamp_min(LEAST_LOG)
        if not torch.isfinite(logs).all():
            raise NotFinite(
                "the teacher's logits are NaN or infinite: it is damaged, or the precision too narrow for it"
            )
        self._ids[places.numpy()] = ids.cpu().numpy().astype(self.shape.id_type)
        self._logs[places.numpy()] = logs.cpu().numpy().astype(np.float16)

    def flush(self) -> None:
        self._ids.flush()
        self._logs.flush()


def asked(
    frame: Frame,
    examples: Examples,
    shape: Shape,
    temperature: float,
    directory: Path,
    mark: str,
    notify: Notify,
    memory_bytes: int | None = None,
    before: int = 0,
) -> Stored:
    """What the teacher says, from an earlier attempt as far as that came. mark: of all that decides it. before: tokens
    that it read already.
    """
    chunks, story = chunks_of(examples), directory / STORY
    done = _done(story, mark)
    if done == len(chunks):
        return Stored(directory, shape, examples)
    directory.mkdir(parents=True, exist_ok=True)
    if done == 0:
        write_whole(story, json.dumps([mark, 0]))
        for name, size in ((IDS, shape.kept * shape.id_type().itemsize), (LOGS, 2 * (shape.kept + 1))):
            with (directory / name).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shape.tokens * size)  # a mapped page without room kills us
    stored = Stored(directory, shape, examples, "r+")
    notify.event(
        "info",
        f"the teacher reads {len(examples.ids):,} tokens; {shape.bytes_per_token} bytes are kept of each of "
        f"{shape.tokens:,} learned ones",
        bytes_per_token=shape.bytes_per_token,
    )
    for number, chunk in enumerate(chunks[done:], start=done + 1):

        def take(places: Tensor, hidden: Tensor) -> None:
            for part, logits in logits_in_slices(frame, hidden):
                stored.put(places[part], logits[:, : shape.vocabulary] / temperature)

        told = before + int(examples.starts[chunk.start]), before + len(examples.ids)
        read_chunk(frame, examples, chunk, take, directory, notify, memory_bytes, told)
        stored.flush()
        write_whole(story, json.dumps([mark, number]))
    return Stored(directory, shape, examples)


def _done(story: Path, mark: str) -> int:
    """Chunks that are kept whole."""
    if not story.is_file():
        return 0
    known, done = json.loads(story.read_text(encoding="utf-8"))
    return int(done) if known == mark else 0
