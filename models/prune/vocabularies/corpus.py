"""All texts of a user's file as the tokenizer meets them, read as a stream: counted, and compared after the trimming.

Where it stands is kept from time to time, so that another attempt goes on from there.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from models.progress import Notify
from models.quoting import quoted
from models.texts.documents import rows_of, text_of
from squeeze.errors import CertificationFailed, DataUnusable
from squeeze.texts.records import Chat, Exchange, blamed, record_of

BATCH_CHARACTERS, BATCH_TEXTS = 1 << 22, 4096  # that become tokens at once
LONGEST = 1 << 22  # characters of a text that are read at once
OVERLAP = 4096  # characters on either side of where a longer one is cut
PARAM = "data.source"
EXCERPT = 60

Texts = Callable[[], Iterator[tuple[str, str]]]  # (where it stands, text)


@dataclass(frozen=True)
class Survey:
    """sha256: of all texts in their order."""

    texts: int
    characters: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Found:
    """counts: of each token in all texts, (numbers,) int64."""

    counts: Tensor

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def numbers(self) -> set[int]:
        return set(self.counts.nonzero().flatten().tolist())

    @property
    def new_share(self) -> float:
        """Share of further text of the same kind whose tokens would be none of these, by the share of tokens that were
        seen once (Good, Biometrika 40, 1953).
        """
        return float((self.counts == 1).sum()) / max(1, self.tokens)


def texts_in(source: Path, column: str | None, tokenizer: Any) -> Texts:
    """Every record of a file or of a directory's files in each way that a job reads it: as a text, a prompt and its
    completion also apart, a chat also as the model's template writes it, with and without what announces an answer.
    """

    def texts() -> Iterator[tuple[str, str]]:
        with blamed(PARAM):
            for number, (where, row) in enumerate(rows_of(source, column), start=1):
                whole = row if isinstance(row, str) else text_of(row, column, where)
                for text in (whole, *_apart(row, column, where, tokenizer)):
                    yield from ((where or f"part {number}", piece) for piece in _pieces(text))

    return texts


def opening_of_chats(tokenizer: Any) -> list[str]:
    """What a model's chat template writes around messages."""
    if not tokenizer.chat_template:
        return []
    chat = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    return [_templated(tokenizer, chat, announced=True, where="a chat of one letter a turn")]


def survey(texts: Texts) -> Survey:
    """Raises DataUnusable where there is no text."""
    count = characters = size_bytes = 0
    digest = hashlib.sha256()
    for _, text in texts():
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
        count, characters, size_bytes = count + 1, characters + len(text), size_bytes + len(raw)
    if not count:
        raise DataUnusable("the file has no text, so that no token is needed: give one with text", param=PARAM)
    return Survey(count, characters, size_bytes, digest.hexdigest())


class Pass:
    """A way through all texts that another attempt goes on with. directory: of this pass alone; what another `mark`
    left in it is deleted.
    """

    def __init__(self, directory: Path, mark: str, size: Survey, notify: Notify, snapshot_seconds: float) -> None:
        self._directory, self._size, self._notify, self._seconds = directory, size, notify, snapshot_seconds
        note = directory / "mark"
        if directory.exists() and (not note.is_file() or note.read_text(encoding="utf-8") != mark):
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        note.write_text(mark, encoding="utf-8")

    def run(self, texts: Texts, sums: Tensor, work: Callable[[list[tuple[str, str]]], None]) -> None:
        """Has `work` look at all texts, a batch at a time. sums: that it adds to, kept between attempts."""
        state, done, characters, saved = self._directory / "state.safetensors", 0, 0, time.monotonic()
        if state.is_file():
            held = load_file(state)
            sums.copy_(held["sums"])
            done = int(held["done"])
            self._notify.event("info", f"going on after {done:,} parts of the text, which an earlier attempt read")
        for number, batch in enumerate(_batches(texts())):
            characters += sum(len(text) for _, text in batch)
            if number < done:
                continue
            work(batch)
            self._notify.advance(characters, self._size.characters, "characters")
            if time.monotonic() - saved >= self._seconds:
                self._save(state, sums, number + 1)
                saved = time.monotonic()
            done = number + 1
        self._save(state, sums, done)

    def _save(self, state: Path, sums: Tensor, done: int) -> None:
        part = state.with_suffix(".part")
        save_file({"sums": sums, "done": torch.tensor(done)}, part)
        part.replace(state)


def count(texts: Texts, tokenizers: Sequence[Tokenizer], numbers: int, way: Pass) -> Found:
    """How often each token stands in the texts, by the first of the tokenizers; by the others that it does at all.

    numbers: that there are.
    """
    counts = torch.zeros(numbers, dtype=torch.int64)

    def add(batch: list[tuple[str, str]]) -> None:
        for place, tokenizer in enumerate(tokenizers):
            encoded = tokenizer.encode_batch_fast([text for _, text in batch])
            ids = np.fromiter(chain.from_iterable(one.ids for one in encoded), np.int64)
            found = torch.from_numpy(np.bincount(ids, minlength=numbers))
            counts.add_(found if place == 0 else ((found > 0) & (counts == 0)))

    way.run(texts, counts, add)
    return Found(counts)


def compare(texts: Texts, pairs: Sequence[tuple[Tokenizer, Tokenizer]], renumber: Tensor, way: Pass) -> int:
    """How many texts decode to themselves. Raises CertificationFailed, with the text, where a trimmed tokenizer gives
    other tokens than the original, or they decode to another text.

    renumber: the new number of each old one, (numbers,) int64; -1 where it is left out.
    """
    themselves = torch.zeros(1, dtype=torch.int64)
    table = renumber.numpy()

    def look(batch: list[tuple[str, str]]) -> None:
        some = [text for _, text in batch]
        for place, (original, other) in enumerate(pairs):
            before = [one.ids for one in original.encode_batch_fast(some)]
            after = [one.ids for one in other.encode_batch_fast(some)]
            told = original.decode_batch(before, skip_special_tokens=False)
            tells = other.decode_batch(after, skip_special_tokens=False)
            for (where, text), old, new, meant, means in zip(batch, before, after, told, tells, strict=True):
                if not np.array_equal(table[old], new) or meant != means:
                    raise _changed(where, text, "tokens" if meant == means else "text")
            if place == 0:
                bare = other.decode_batch(after, skip_special_tokens=True)
                themselves.add_(sum(one == text for one, text in zip(bare, some, strict=True)))

    way.run(texts, themselves, look)
    return int(themselves)


def lengths(texts: Iterator[str], tokenizers: Sequence[Tokenizer], kept: Tensor) -> tuple[list[int], int, int]:
    """(tokens by each tokenizer, tokens of the first that are kept, bytes) of texts. kept: (numbers,) bool."""
    totals, covered, size_bytes = [0] * len(tokenizers), 0, 0
    stays = kept.numpy()
    for batch in _batches(("", text) for text in texts):
        some = [text for _, text in batch]
        size_bytes += sum(len(text.encode()) for text in some)
        for place, tokenizer in enumerate(tokenizers):
            encoded = [one.ids for one in tokenizer.encode_batch_fast(some, add_special_tokens=False)]
            totals[place] += sum(map(len, encoded))
            covered += int(stays[list(chain.from_iterable(encoded))].sum()) if place == 0 else 0
    return totals, covered, size_bytes


def _batches(texts: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, characters = [], 0
    for each in texts:
        batch.append(each)
        characters += len(each[1])
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _apart(row: object, column: str | None, where: str, tokenizer: Any) -> list[str]:
    """The other ways in which a record is read."""
    if isinstance(row, str):
        return []
    try:
        record = record_of(row, column, where)
    except DataUnusable:  # no training could learn from it, and it is a text all the same
        return []
    if isinstance(record, Exchange):
        return [record.prompt, record.completion]
    if not isinstance(record, Chat) or not tokenizer.chat_template:
        return []
    messages = list(record.messages)
    turns = [number for number, one in enumerate(messages) if number and one["role"] == "assistant"]
    prompts = [_templated(tokenizer, messages[:number], announced=True, where=where) for number in turns]
    return [_templated(tokenizer, messages, announced=False, where=where), *prompts]


def _templated(tokenizer: Any, messages: list[dict[str, str]], *, announced: bool, where: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=announced))
    except Exception as error:
        raise DataUnusable(
            f"{where}: the model's chat template refuses it: {quoted(error, 200)}", param=PARAM
        ) from error


def _pieces(text: str) -> Iterator[str]:
    """A text, whole; a very long one in pieces, and what stands around each cut once more."""
    if len(text) <= LONGEST:
        if text:
            yield text
        return
    start = 0
    while start < len(text):
        cut = text.rfind("\n", start + LONGEST // 2, start + LONGEST) + 1
        end = cut if cut and start + LONGEST < len(text) else min(start + LONGEST, len(text))
        yield text[start:end]
        if end < len(text):
            yield text[end - OVERLAP : end + OVERLAP]
        start = end


def _changed(where: str, text: str, what: str) -> CertificationFailed:
    excerpt = text if len(text) <= EXCERPT else f"{text[:EXCERPT]}…"
    return CertificationFailed(
        f"{where} of the data gets other {what} from the trimmed tokenizer than from the original: {excerpt!r}. Leave "
        "it out, or name it in `keep`, and tell us of it"
    )
