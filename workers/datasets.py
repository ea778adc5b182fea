"""What a Hub dataset's name stands for: a commit, a split, and the files that hold it.

A dataset's own code never runs. Which file belongs to which split is told much as the `datasets` library tells it: by
`configs` in the card's metadata, or else by the words in the names of directories and files.
"""

import fnmatch
import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import HfApi, constants, metadata_load

from squeeze.errors import DataUnusable, HubUnavailable
from squeeze.specs.job_spec import HubText
from workers.download import Snapshot
from workers.hub import TIMEOUT_SECONDS, Repo, RepoFile, described, patiently, plain_words

SHARDS_MAX = 64  # of one split; as they are spread over it, more would tell nothing new
_CARD, _CARD_BYTES_MAX = "README.md", 16 << 20
_DEFAULT = "default"  # the subset of a dataset that has no others

# Where a split comes as several kinds of file, they hold the same, or the others are a licence and the like.
_KINDS = (".parquet", ".jsonl", ".ndjson", ".json", ".txt")
_READABLE = re.compile(r"(\.parquet|(\.jsonl|\.ndjson|\.json|\.txt)(\.gz|\.zst)?)$", re.IGNORECASE)
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|notice|requirements|config|dataset_infos?|dataset_dict|state)\b", re.IGNORECASE
)
_OTHERS = (".csv", ".tsv", ".arrow", ".zip", ".tar", ".tgz", ".gz", ".zst", ".bz2", ".xz", ".h5", ".sqlite", ".db")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_SHARD = re.compile(r"(?P<split>[\w.]+)-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Dataset:
    """One split of a dataset at one commit. repo: holds the split's shards, in the order in which they are taken."""

    repo: Repo
    part: str

    @property
    def origin(self) -> str:
        """What the report calls it."""
        return f"hub:{self.repo.id}@{self.repo.commit}:{self.part}"


@dataclass(frozen=True)
class Parts:
    """files: by subset, then split. usual: the subset that is meant where none is named."""

    files: dict[str, dict[str, list[str]]]
    usual: str | None


def resolve(name: HubText, cache: Path, note: Path) -> Dataset:
    """The split that a name stands for. note: holds what an earlier attempt of the job found, which then holds.

    Raises DataUnusable where there is no such dataset, revision or split, or nothing that can be read without code.
    """
    try:
        held = json.loads(note.read_text())
        files = tuple(RepoFile(**file) for file in held["repo"]["files"])
        return Dataset(Repo(**{**held["repo"], "files": files}), held["part"])
    except (FileNotFoundError, ValueError):
        pass
    with plain_words(name.repo, name.revision, "dataset"):
        info = patiently(
            lambda: HfApi().dataset_info(
                name.repo, revision=name.revision, files_metadata=True, timeout=TIMEOUT_SECONDS
            )
        )
    commit = info.sha
    if not commit:
        raise HubUnavailable(f"{constants.ENDPOINT} names no commit for {name.repo}; is it a Hub?")
    siblings = {one.rfilename: one for one in info.siblings or [] if _lies_inside(one.rfilename)}
    configs: list[dict[str, Any]] = []
    if _CARD in siblings:
        card = described(name.repo, commit, siblings[_CARD], "dataset")
        configs = _configs(Repo(name.repo, commit, None, (card,), "dataset"), cache)
    parts = parts_of(siblings, configs)
    if not parts.files:
        raise DataUnusable(_nothing_readable(name.repo, siblings))
    part, names = choose(name, parts)
    shards = tuple(described(name.repo, commit, siblings[file], "dataset") for file in spread(names)[:SHARDS_MAX])
    dataset = Dataset(Repo(name.repo, commit, None, shards, "dataset"), part)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(asdict(dataset)))
    return dataset


def parts_of(names: Iterable[str], configs: Sequence[dict[str, Any]]) -> Parts:
    """The subsets and splits of a dataset. names: of its files. configs: as in its card's metadata.

    Files that can't be read as text, and splits that have no others, are left out.
    """
    readable = sorted(name for name in names if _is_data(name))
    files: dict[str, dict[str, list[str]]] = {}
    usual = None
    for config in configs:
        subset = str(config.get("config_name", _DEFAULT))
        if config.get("default") is True:
            usual = subset
        files[subset] = _by_card(config, readable)
    if not configs:
        for name in readable:
            files.setdefault(_subset_of(name), {}).setdefault(_split_of(name), []).append(name)
    files = {
        subset: {split: _one_kind(some) for split, some in splits.items() if some} for subset, splits in files.items()
    }
    files = {subset: splits for subset, splits in files.items() if splits}
    if usual is None:
        usual = _DEFAULT if _DEFAULT in files else next(iter(files)) if len(files) == 1 else None
    return Parts(files, usual)


def choose(name: HubText, parts: Parts) -> tuple[str, list[str]]:
    """The part that a name means, as the report calls it, and its files; of several splits without a name, `train`."""
    subset, split = parts.usual, None
    if name.part is not None:
        first, _, second = name.part.partition("/")
        if second:
            subset, split = first, second
        elif first in parts.files and first not in parts.files.get(subset or "", {}):
            subset = first
        else:
            split = first
    splits = parts.files.get(subset or "", {})
    if split is not None and split not in splits:
        split = _SPLIT_OF.get(split, split)  # `valid` where the files say `dev`
    if split is None:
        split = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
    if subset is None or split not in splits:
        wanted = f"has no part {name.part!r}" if name.part else "has several parts"
        there = [part if one == parts.usual else f"{one}/{part}" for one in parts.files for part in parts.files[one]]
        more = f" and {len(there) - 12} more" if len(there) > 12 else ""
        raise DataUnusable(f"{name.repo} {wanted}; name one as hub:{name.repo}:PART: {', '.join(there[:12])}{more}")
    return (split if subset in (_DEFAULT, split) or len(parts.files) == 1 else f"{subset}/{split}"), splits[split]


def spread(names: Sequence[str]) -> list[str]:
    """The same names in an order whose every beginning is spread over them: with bits reversed (van der Corput)."""
    bits = (len(names) - 1).bit_length()
    order = (int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits)) if bits else iter((0,))
    return [names[n] for n in order if n < len(names)]


def _lies_inside(name: str) -> bool:
    """A listing must not lead out of the directory that its files go to."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _configs(card: Repo, cache: Path) -> list[dict[str, Any]]:
    """`configs` of a card, as far as they are what they should be: what is not is no reason to fail."""
    if card.files[0].size_bytes > _CARD_BYTES_MAX:
        return []
    snapshot = Snapshot(cache, card)
    snapshot.fetch([_CARD], lambda _: None)
    try:
        held = (metadata_load(snapshot.path / _CARD) or {}).get("configs")
    except (ValueError, yaml.YAMLError):
        return []
    return [one for one in held if isinstance(one, dict)] if isinstance(held, list) else []


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return bool(_READABLE.search(name)) and not hidden and not _NO_DATA.match(path.name)


def _one_kind(names: list[str]) -> list[str]:
    kinds = [[name for name in names if re.search(rf"\{kind}(\.gz|\.zst)?$", name, re.IGNORECASE)] for kind in _KINDS]
    return next(some for some in kinds if some)


def _by_card(config: dict[str, Any], names: list[str]) -> dict[str, list[str]]:
    folder = config.get("data_dir")
    if isinstance(folder, str) and folder.strip("/."):
        names = [name for name in names if matches(name, folder)]
    given = config.get("data_files")
    if given is None:
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(_split_of(name), []).append(name)
        return found
    return {
        split: [name for name in names if any(matches(name, pattern) for pattern in patterns)]
        for split, patterns in _patterns(given).items()
    }


def _patterns(given: Any) -> dict[str, list[str]]:
    """The forms that `data_files` takes: a pattern, a list of them, or of them by split."""
    if isinstance(given, dict):
        return {str(split): _strings(some) for split, some in given.items()}
    entries = given if isinstance(given, list) else [given]
    named = [one for one in entries if isinstance(one, dict)]
    if named:
        return {str(one.get("split", "train")): _strings(one.get("path")) for one in named}
    return {"train": _strings(entries)}


def _strings(value: Any) -> list[str]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a file, or a directory above it. `**` stands for any number of directories.

    Takes time in proportion to the product of both lengths, whatever a stranger's pattern looks like.
    """
    parts = name.split("/")
    reached: Collection[int] = {0}
    for step in (one for one in pattern.split("/") if one not in ("", ".")):
        if step == "**":
            reached = range(min(reached), len(parts) + 1) if reached else ()
        else:
            reached = {n + 1 for n in reached if n < len(parts) and fnmatch.fnmatchcase(parts[n], step)}
    return any(reached)


def _subset_of(name: str) -> str:
    """The first directory that is no split and not merely called `data`."""
    folders = PurePosixPath(name).parts[:-1]
    return next((one for one in folders if one != "data" and _spoken(one) is None), _DEFAULT)


def _split_of(name: str) -> str:
    *folders, base = PurePosixPath(name).parts
    shard = _SHARD.match(base)
    if shard:
        return _SPLIT_OF.get(shard["split"], shard["split"])
    return next((split for one in [*reversed(folders), base] if (split := _spoken(one))), "train")


def _spoken(part: str) -> str | None:
    """The split that a word in the name of a file or directory says."""
    words = re.split(r"[-._ 0-9]+", part.lower())
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), None)


def _nothing_readable(repo: str, names: Collection[str]) -> str:
    scripts = sorted(name for name in names if name.endswith(".py") and "/" not in name)
    if scripts:
        return (
            f"{repo} is made by a program of its own ({scripts[0]}), which is never run here. Where the Hub has "
            f"converted it, hub:{repo}@refs/convert/parquet names what came out."
        )
    others = sorted({end for name in names for end in _OTHERS if name.lower().endswith(end)})
    has = f"has its data as {', '.join(others)}" if others else "has no files of data"
    return f"{repo} {has}; parquet, JSONL and plain text are read (the latter two also as .gz or .zst)"
