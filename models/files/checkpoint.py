"""A model directory as its author published it: config, tensors by name, other files. Nothing is loaded until asked."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from models.files.architectures import Architecture, architecture_of
from models.files.disk import write_whole
from models.files.safetensors_file import DTYPE_NAMES, Entry, read, read_header
from models.streaming.experts import split
from squeeze.errors import ModelMalformed, ModelUnsafe
from squeeze.shapes.model import Shape, shape_of

INDEX = "model.safetensors.index.json"
LEGACY_INDEX = "pytorch_model.bin.index.json"
# The same weights in their maker's own layout, and weights that are no model by themselves.
NOT_THE_MODEL = ("consolidated", "adapter_model", "optimizer")


@dataclass(frozen=True)
class SourceModel:
    """A directory with `config.json` and safetensors shards.

    config: `config.json` as it is.
    entries: where every tensor lies, by its name in the files; of fused experts, where each expert's lie.
    row: the model's line of the architecture table.
    """

    path: Path
    config: dict[str, Any]
    entries: dict[str, Entry] = field(repr=False)
    row: Architecture

    def names(self) -> list[str]:
        """Tensor names as in the files."""
        return list(self.entries)

    def tensor(self, name: str) -> Tensor:
        """One tensor, read into memory of its own, as stored."""
        return read(self.entries[name])

    def file_key(self, name: str) -> str | None:
        """The name in the files of a parameter that transformers calls `name`; None when no file has it.

        Checkpoints saved from a bare base model lack its prefix, some older ones have one too many.
        """
        prefix, names = f"{self.row.prefix}.", [self.row.file_name(name), name]
        if self.row.head_alias and name.startswith("lm_head."):
            names.append(self.row.head_alias + name.removeprefix("lm_head"))
        candidates = [key for each in names for key in (each, each.removeprefix(prefix), prefix + each)]
        return next((key for key in candidates if key in self.entries), None)

    def module_key(self, module: str, parameter: str) -> str:
        """As `file_key`, for a parameter that must be there."""
        key = self.file_key(f"{module}.{parameter}")
        if key is None:
            raise ModelMalformed(f"the weights hold no tensor {module}.{parameter}, which the config says there is")
        return key

    def shape(self, ignored: Sequence[str] = ()) -> Shape:
        """What the cost of its compression depends on. ignored: patterns of linears that are not compressed."""
        tensors = {name: entry.shape for name, entry in self.entries.items()}
        return shape_of(self.config, tensors, DTYPE_NAMES[self.dtype], ignored)

    @property
    def weight_bytes(self) -> int:
        return sum(entry.end - entry.start for entry in self.entries.values())

    @property
    def parameters(self) -> int:
        return sum(torch.Size(entry.shape).numel() for entry in self.entries.values() if entry.dtype.is_floating_point)

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that most of the weights have."""
        counts: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            if entry.dtype.is_floating_point:
                counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.end - entry.start
        if not counts:
            raise ModelMalformed("the weight files hold no floating-point tensor")
        return max(counts, key=lambda dtype: counts[dtype])


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a model directory."""
    unreadable = [file.name for file in (path, *path.glob("*")) if not os.access(file, os.R_OK) and file.exists()]
    if unreadable:
        raise ModelMalformed(f"the service's user may not read {', '.join(unreadable[:5])} of the model directory")
    file = path / "config.json"
    if not file.is_file():
        raise ModelMalformed("the model has no config.json; it must be a transformers model directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelMalformed(f"config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelMalformed("config.json is not an object")
    return config


def open_model(path: Path) -> SourceModel:
    """Opens a directory with safetensors weights; reads headers, no tensors."""
    config = read_config(path)
    row = architecture_of(config)
    return SourceModel(path, config, split(tensor_entries(path), row), row)


def open_or_convert(path: Path, converted: Path) -> SourceModel:
    """As `open_model`; pickled weights are rewritten into `converted` first, unless that was done for these files."""
    if not has_legacy_weights_only(path):
        return open_model(path)
    mark, files = converted / "complete", [file for file in sorted(path.glob("*.bin")) if file.is_file()]
    origin = json.dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    if not mark.is_file() or mark.read_text(encoding="utf-8") != origin:
        shutil.rmtree(converted, ignore_errors=True)
        convert_legacy(path, converted)
        write_whole(mark, origin)
    return open_model(converted)


def tensor_entries(path: Path) -> dict[str, Entry]:
    """Where every tensor of a model directory lies."""
    entries: dict[str, Entry] = {}
    for shard in _shards(path):
        for name, entry in read_header(shard).items():
            if name in entries:
                raise ModelMalformed(f"tensor {name!r} stands in two weight files")
            entries[name] = entry
    return entries


def has_legacy_weights_only(path: Path) -> bool:
    """True where the weights are pickled (`pytorch_model*.bin`) and there is no safetensors file of them."""
    return not _weight_files(path, "*.safetensors") and bool(_weight_files(path, "pytorch_model*.bin"))


def convert_legacy(path: Path, out: Path) -> None:
    """Rewrites pickled weights as safetensors in `out`, one shard at a time, beside links to the other files.

    Reads through torch's `weights_only` unpickler, which runs no code of the file's.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for number, shard in enumerate(_legacy_shards(path)):
        state = _unpickled(shard)
        tensors = {name: value.clone().contiguous() for name, value in state.items() if name not in seen}
        seen.update(tensors)
        target = out / f"model-{number:05d}.safetensors"
        save_file(tensors, target.with_suffix(".part"), metadata={"format": "pt"})
        target.with_suffix(".part").rename(target)
        del state, tensors
    for file in path.iterdir():
        link = out / file.name
        if file.is_file() and file.suffix != ".bin" and file.name != LEGACY_INDEX and not link.exists():
            link.symlink_to(file.resolve())


def _unpickled(shard: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(shard, map_location="cpu", weights_only=True, mmap=_is_zip(shard))
    except UnpicklingError as error:
        raise ModelUnsafe(
            f"{shard.name} is no pickle of tensors alone, so it can't be read without running code of its author. "
            "Ask for the model as safetensors, or convert it yourself."
        ) from error
    except Exception as error:
        raise ModelMalformed(
            f"{shard.name} can't be read ({type(error).__name__}): it is damaged or cut short, or from a torch too old "
            "to be read safely. Fetch it again, or ask for the model as safetensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelUnsafe(f"{shard.name} holds more than tensors; ask for the model as safetensors")
    return state


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _shards(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        return _indexed(path, INDEX, ".safetensors")
    single = path / "model.safetensors"
    shards = [single] if single.is_file() else _weight_files(path, "*.safetensors")
    if not shards:
        raise ModelMalformed("the model has no weights: neither safetensors files nor pytorch_model.bin")
    return shards


def _legacy_shards(path: Path) -> list[Path]:
    if (path / LEGACY_INDEX).is_file():
        return _indexed(path, LEGACY_INDEX, ".bin")
    single = path / "pytorch_model.bin"
    return [single] if single.is_file() else _weight_files(path, "pytorch_model*.bin")


def _weight_files(path: Path, pattern: str) -> list[Path]:
    found = (file for file in path.glob(pattern) if file.is_file())
    return sorted(file for file in found if not file.name.startswith(NOT_THE_MODEL))


def _indexed(path: Path, index: str, suffix: str) -> list[Path]:
    """The shards that an index names."""
    try:
        names = sorted(set(json.loads((path / index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelMalformed(f"{index} can't be read: {error}") from error
    for name in names:
        # A stranger's index must not lead out of the directory.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise ModelMalformed(f"{index} names {name!r}, which is no weight file of this directory")
        if not (path / name).is_file():
            raise ModelMalformed(f"{index} names {name}, which is missing: the download or copy is incomplete")
    return [path / name for name in names]
