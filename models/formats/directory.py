"""What every format shares: the directory around the weights, written beside its final place and moved there whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from models.files.checkpoint import SourceModel
from models.files.disk import disk_faults
from models.files.safetensors_file import Entry
from models.files.safetensors_file import read as read_tensor
from models.formats.shards import Piece
from models.streaming.frame import weightless
from models.weights.quantized import QuantizedModel, Site
from squeeze.errors import ModelMalformed
from squeeze.shapes.model import COMPUTED

# What stands beside the weights and is taken along: tokenizer, generation settings, chat templates, terms of use.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tekken.json",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

WEIGHTS = ("*.safetensors", "*.safetensors.zst", "*.gguf", "*.onnx", "*.onnx_data")

# Settings that say where a file lay on its author's machine, or ask for code of the repository or for a kernel that the
# reader may lack.
PRIVATE_KEYS = frozenset(
    {
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "name_or_path",
        "tokenizer_file",
        "vocab_file",
        "merges_file",
        "special_tokens_map_file",
    }
)


@dataclass(frozen=True)
class Skeleton:
    """The source as transformers sees it, without weights.

    names: its parameters and stored buffers as files name them, in the model's order; experts unfused.
    linears: all its linear layers and routers, by the module names that files have.
    """

    names: tuple[str, ...]
    linears: tuple[str, ...]


def skeleton_of(source: SourceModel) -> Skeleton:
    model = weightless(source.path, torch.float32)
    linears = tuple(
        source.row.file_name(name)
        for name, module in model.named_modules()
        # A router keeps a plain matrix, which other engines take for a linear layer's.
        if isinstance(module, nn.Linear | Conv1D) or type(module).__name__.endswith("Router")
    )
    return Skeleton(tuple(map(source.row.file_name, model.state_dict())), linears)


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A fresh directory beside `out` that takes its place at the end; nothing is left behind when something fails."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_faults():
            partial.mkdir(parents=True)
            yield partial
            if out.exists():  # what an earlier attempt wrote
                shutil.rmtree(out)
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def linked(whole: Path, out: Path) -> None:
    """A directory of the same files, which take no room on the disk twice; what is at `out` is replaced."""
    with written_whole(out) as partial:
        shutil.copytree(whole, partial, copy_function=os.link, dirs_exist_ok=True)


def pieces_of(
    source: SourceModel, skeleton: Skeleton, quantized: QuantizedModel, site_piece: Callable[[Site], Piece]
) -> list[Piece]:
    """All tensors of the result in the model's order, under the names that transformers gives them in its files.

    The weight of a quantized linear becomes what `site_piece` says; what took over a scale is written as it then was;
    everything else is copied as it is stored.
    """
    pieces: list[Piece] = []
    changed = quantized.changed()
    copied: set[str] = set()
    for name in skeleton.names:
        key = source.file_key(name)
        if key is None or key in copied:  # a tied weight stands once in the files
            continue
        copied.add(key)
        module, _, leaf = name.rpartition(".")
        site = quantized.sites.get(module)
        if site and leaf == "weight":
            pieces.append(site_piece(site))
        elif name in changed:
            pieces.append(_changed(name, changed[name], quantized.dtype))
        else:
            alias = source.row.head_alias
            pieces.append(_copy(source, key, key if alias and key.startswith(f"{alias}.") else name))
    pieces += [_changed(name, entry, entry.dtype) for name, entry in changed.items() if name not in skeleton.names]
    # A tensor that the model class doesn't know may still mean something to another engine.
    pieces += [_copy(source, key, key) for key in source.names() if key not in copied and not COMPUTED.search(key)]
    return pieces


def write_companions(source: SourceModel, out: Path) -> None:
    """Copies tokenizer, generation settings, chat templates and terms of use."""
    for file in _companions(source):
        target = out / file.relative_to(source.path)
        target.parent.mkdir(exist_ok=True)
        settings = _settings(file) if file.suffix == ".json" else None
        if isinstance(settings, dict) and PRIVATE_KEYS.intersection(settings):
            write_json(target, without_private(settings))
        else:
            shutil.copyfile(file, target)


def refuse_broken_companions(source: SourceModel) -> None:
    """Raises where a settings file can't be read, before the work that it would end."""
    for file in _companions(source):
        if file.suffix == ".json":
            _settings(file)


def write_config(source: SourceModel, quantized: QuantizedModel, quantization: Mapping[str, Any], out: Path) -> None:
    """`config.json` of the source with the quantization added.

    Where the source names no dtype, its weights' is named: loaders would take it from the first tensor that they meet,
    which may now be a scale.
    """
    config = without_private(source.config)
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = str(quantized.dtype).removeprefix("torch.")
    config["quantization_config"] = dict(quantization)
    if source.row.unpacked and quantization.get("quant_method") == "compressed-tensors":
        # transformers' code for these reads the weights themselves, and so has to unpack them while loading.
        config["quantization_config"]["dequantize"] = True
    write_json(out / "config.json", config)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_private(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without paths of a machine and without references to code."""
    return {key: value for key, value in settings.items() if key not in PRIVATE_KEYS}


def weight_bytes(directory: Path) -> int:
    """Bytes of a written directory's weight files."""
    return sum(file.stat().st_size for pattern in WEIGHTS for file in directory.glob(pattern))


def _copy(source: SourceModel, key: str, name: str) -> Piece:
    entry = source.entries[key]

    def make() -> dict[str, Tensor]:
        return {name: source.tensor(key)}

    return Piece({name: (entry.dtype, entry.shape)}, make)


def _companions(source: SourceModel) -> list[Path]:
    return [file for pattern in COMPANIONS for file in sorted(source.path.glob(pattern)) if file.is_file()]


def _settings(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelMalformed(
            f"{file.name} is not JSON ({error}); repair it, or remove it if it isn't needed"
        ) from error


def _changed(name: str, entry: Entry, dtype: torch.dtype) -> Piece:
    return Piece({name: (dtype, entry.shape)}, lambda: {name: read_tensor(entry).to(dtype)})
