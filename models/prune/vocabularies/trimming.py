"""A model with fewer tokens on disk: rows of the embedding and the output head, and all files that number tokens."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.distill.cutting import written
from models.files.checkpoint import SourceModel
from models.files.safetensors_file import Entry, read
from models.formats.directory import without_private, write_companions, write_json
from models.formats.shards import Piece
from models.progress import Notify
from models.prune.vocabularies import sentencepiece
from models.prune.vocabularies.pieces import Rules, merge_stays, trimmed
from models.prune.vocabularies.token_ids import renumbered, renumbered_tokenizer
from models.texts.material import read_tokenizer
from squeeze.errors import ArchitectureUnsupported
from squeeze.shapes.slimmed import Sides
from squeeze.shapes.vocabularies import ROWS, SIZE

BAND_BYTES = 16 << 20  # of an embedding that are read at once
RULES, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
VOCABULARY, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
# Tokenizers in layouts that are left out where they can't be written anew; tokenizer.json says all that they do.
OTHERS = ("*.model", "*.model.v*", "*.tiktoken", "tekken.json", "vocab.txt")


@dataclass(frozen=True)
class Words:
    """A model's tokenizer. whole: as transformers loads it. rules: `tokenizer.json`, of the files or as transformers
    has it. readers: those that may be at work: transformers', and what the file says where that differs.
    """

    whole: Any
    rules: Rules
    readers: tuple[Tokenizer, ...]

    @property
    def numbers(self) -> dict[str, int]:
        """Of each token, added ones among them."""
        return {token: number for one in self.readers for token, number in one.get_vocab().items()}

    @property
    def end(self) -> int:
        """The first number behind all of them."""
        return 1 + max(self.numbers.values())


def words_of(directory: Path) -> Words:
    """Raises ArchitectureUnsupported where the tokenizer is not one of `tokenizers`."""
    whole = read_tokenizer(directory)
    if not hasattr(whole, "backend_tokenizer"):
        raise ArchitectureUnsupported(
            "the tokenizer of this model has no tokenizer.json, nor can it be written as one: it can't be trimmed",
            param="method",
        )
    backend = _bare(Tokenizer.from_str(whole.backend_tokenizer.to_str()))
    file = directory / RULES
    if not file.is_file():
        return Words(whole, json.loads(backend.to_str()), (backend,))
    own = _bare(Tokenizer.from_file(str(file)))
    readers = (backend,) if own.to_str() == backend.to_str() else (backend, own)
    numbers = backend.get_vocab()
    if any(numbers.get(token, number) != number for token, number in own.get_vocab().items()):
        raise ArchitectureUnsupported(
            "transformers gives the tokens of this model other numbers than its tokenizer.json, so that it can't be "
            "trimmed",
            param="method",
        )
    return Words(whole, json.loads(file.read_text(encoding="utf-8")), readers)


def write_beside(
    source: SourceModel, words: Words, settings: Mapping[str, Any], new: Mapping[int, int], out: Path
) -> list[str]:
    """Everything but the weights, with new numbers, into a fresh directory. Returns the names of files that are left
    out, which can't be written anew.

    settings: of `config.json`. new: the new number of each old one that stays, rising.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_companions(source, out)
    write_json(out / "config.json", settings)
    write_json(out / RULES, trimmed(words.rules, new))
    for name, change in ((SETTINGS, renumbered_tokenizer), (GENERATION, renumbered)):
        if (out / name).is_file():
            write_json(out / name, change(json.loads((out / name).read_text(encoding="utf-8")), new))
    return _rewrite_others(out, new)


def weights(source: SourceModel, sides: Sides, kept: Tensor, band_bytes: int = BAND_BYTES) -> list[Piece]:
    """Of the trimmed model; of what has a row for each token a band is read at a time. kept: old numbers, rising."""
    return [_rows(source, name, kept, band_bytes) if ROWS.search(name) else _whole(source, name) for name in sides]


def trimmed_config(source: SourceModel, new: Mapping[int, int], rows: int) -> dict[str, Any]:
    """`config.json` of the trimmed model."""
    return without_private(renumbered(source.config, new)) | {SIZE: rows}


def write_trimmed(
    source: SourceModel,
    sides: Sides,
    kept: Tensor,
    settings: Mapping[str, Any],
    companions: Path,
    out: Path,
    notify: Notify,
) -> SourceModel:
    """The model, unless an earlier attempt wrote it. companions: what `write_beside` wrote."""
    told = json.dumps(["vocabulary", kept.tolist()])
    return written(source, out, told, settings, weights(source, sides, kept), notify, companions=companions)


def _rewrite_others(out: Path, new: Mapping[int, int]) -> list[str]:
    """What some tokenizers have beside tokenizer.json, or in its stead."""
    vocabulary, merges, added = out / VOCABULARY, out / MERGES, out / ADDED
    if added.is_file():
        told = json.loads(added.read_text(encoding="utf-8"))
        write_json(added, {token: new[number] for token, number in told.items() if number in new})
    left_out = []
    if vocabulary.is_file():
        told = json.loads(vocabulary.read_text(encoding="utf-8"))
        left = {token: new[number] for token, number in told.items() if number in new}
        vocabulary.write_text(json.dumps(left, ensure_ascii=False), encoding="utf-8")
        if merges.is_file():
            lines = merges.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.startswith("#version") or _line_stays(line, left)]
            merges.write_text("\n".join(kept) + "\n", encoding="utf-8")
    elif merges.is_file():
        merges.unlink()
        left_out.append(MERGES)
    numbers = json.loads((out / RULES).read_text(encoding="utf-8"))["model"]["vocab"]
    old = {number: place for place, number in new.items()}
    pieces = numbers.items() if isinstance(numbers, dict) else ((each[0], place) for place, each in enumerate(numbers))
    texts = {old[number]: piece for piece, number in pieces}
    for file in sorted(file for pattern in OTHERS for file in out.glob(pattern)):
        content = file.read_bytes()
        found = sentencepiece.pieces_of(content)
        # Only where a piece's place is its number in the tokenizer's own vocabulary too.
        if found is not None and all(place < len(found) and found[place] == piece for place, piece in texts.items()):
            file.write_bytes(sentencepiece.trimmed(content, new))
        else:
            file.unlink()
            left_out.append(file.name)
    return left_out


def _line_stays(line: str, left: Mapping[str, int]) -> bool:
    pair = line.split(" ")
    return len(pair) == 2 and merge_stays((pair[0], pair[1]), left)


def _rows(source: SourceModel, name: str, kept: Tensor, band_bytes: int) -> Piece:
    entry = source.entries[name]
    shape = (len(kept), *entry.shape[1:])

    def make() -> dict[str, Tensor]:
        made = torch.empty(shape, dtype=entry.dtype)
        for start, stop in _bands(kept.tolist(), max(1, band_bytes // _row_bytes(entry))):
            first = int(kept[start])
            band = read(_band(entry, first, int(kept[stop - 1]) + 1))
            made[start:stop] = band[kept[start:stop] - first]
        return {name: made}

    return Piece({name: (entry.dtype, shape)}, make)


def _bands(kept: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of kept numbers whose rows, with all between them, are at most so many."""
    start = 0
    for stop in range(1, len(kept) + 1):
        if stop == len(kept) or kept[stop] - kept[start] >= most:
            yield start, stop
            start = stop


def _band(entry: Entry, first: int, last: int) -> Entry:
    """Rows of a tensor, from `first` on to before `last`."""
    each = _row_bytes(entry)
    begin = entry.start + first * each
    return replace(entry, shape=(last - first, *entry.shape[1:]), start=begin, end=begin + (last - first) * each)


def _row_bytes(entry: Entry) -> int:
    return prod(entry.shape[1:]) * entry.dtype.itemsize


def _whole(source: SourceModel, name: str) -> Piece:
    entry = source.entries[name]

    def make() -> dict[str, Tensor]:
        return {name: source.tensor(name)}

    return Piece({name: (entry.dtype, entry.shape)}, make)


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    """Without what cuts texts or fills them up."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
