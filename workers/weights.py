"""Which files of a published model are taken: safetensors, or legacy pickles that hold tensors alone; no code, ever."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from squeeze.errors import ModelMalformed, ModelUnsafe

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
LEGACY_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SMALL_BYTES_MAX = 256 << 20  # the largest tokenizers are some 50 MB

_SMALL_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".bpe", ".vocab"})
_SMALL_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "README.md")
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_OTHERS = {".h5": "TensorFlow", ".msgpack": "Flax", ".gguf": "GGUF", ".onnx": "ONNX"}
# The same weights in their makers' own layout, or weights that are no model by themselves.
_NOT_THE_MODEL = ("consolidated", "adapter_model", "optimizer", "training_args")


@dataclass(frozen=True)
class Choice:
    """first: what must be seen before anything large is fetched. small: the rest but the weights."""

    first: tuple[str, ...]
    small: tuple[str, ...]


def choose(names: Iterable[str]) -> Choice:
    """The files to take before the weights. names: of all files, as paths in the repository."""
    top = sorted(name for name in names if "/" not in name)
    if CONFIG not in top:
        hint = " It is an adapter: name the model that it was made for." if ADAPTER_CONFIG in top else ""
        raise ModelMalformed(f"the model has no config.json; it must be a transformers model.{hint}")
    first = [CONFIG, *(name for name in (INDEX, LEGACY_INDEX) if name in top)]
    small = [
        name
        for name in top
        if name not in first and (Path(name).suffix in _SMALL_SUFFIXES or name.startswith(_SMALL_NAMES))
    ]
    return Choice(tuple(first), tuple(small))


def is_adapter(names: Iterable[str]) -> bool:
    """Whether files are an adapter's, and not a whole model's, beside which an adapter may lie."""
    top = {name for name in names if "/" not in name}
    whole = CONFIG in top and any(
        name.endswith((".safetensors", ".bin")) and not name.startswith(_NOT_THE_MODEL) for name in top
    )
    return ADAPTER_CONFIG in top and not whole


def adapter_files(names: Iterable[str]) -> tuple[str, ...]:
    """The weight file of an adapter; raises ModelUnsafe where it is pickled."""
    top = sorted(name for name in names if "/" not in name)
    if ADAPTER_WEIGHTS in top:
        return (ADAPTER_WEIGHTS,)
    if any(Path(name).suffix in _PICKLES for name in top):
        raise ModelUnsafe(
            "the adapter's weights are pickled, which can run code when they are read. Ask its author for "
            f"{ADAPTER_WEIGHTS}"
        )
    raise ModelMalformed(f"the adapter has no {ADAPTER_WEIGHTS}")


def weight_files(names: Iterable[str], directory: Path) -> tuple[str, ...]:
    """The weight files of a model whose index, where it has one, lies in `directory`.

    Safetensors where there are any, else `pytorch_model*.bin`, which are read without running their code. Raises
    ModelMalformed where there is nothing usable and ModelUnsafe where there are only pickles of other kinds.
    """
    top = sorted(name for name in names if "/" not in name)
    if INDEX in top:
        return _indexed(directory / INDEX, ".safetensors", top)
    if "model.safetensors" in top:
        return ("model.safetensors",)
    plain = [name for name in top if name.endswith(".safetensors") and not name.startswith(_NOT_THE_MODEL)]
    if plain:
        return tuple(plain)
    if LEGACY_INDEX in top:
        return _indexed(directory / LEGACY_INDEX, ".bin", top)
    if "pytorch_model.bin" in top:
        return ("pytorch_model.bin",)
    return _refuse(top)


def refuse_code(config_file: Path) -> None:
    """Raises ModelUnsafe where the model can only be built by code that comes with it."""
    try:
        config: Any = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelMalformed(f"config.json is not JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ModelMalformed("config.json is not an object")
    model_type = config.get("model_type")
    if config.get("auto_map") and model_type not in CONFIG_MAPPING_NAMES:
        raise ModelUnsafe(
            f"the model (model_type {model_type!r}) is built by Python code of its own (`auto_map` in config.json), "
            "which is never run here. Name a version of it whose architecture transformers has built in."
        )


def _indexed(index: Path, suffix: str, top: list[str]) -> tuple[str, ...]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelMalformed(f"{index.name} can't be read ({type(error).__name__})") from error
    for shard in shards:
        if not isinstance(shard, str) or not shard.endswith(suffix) or shard not in top:
            raise ModelMalformed(f"{index.name} names {shard!r}, which is not among the model's files")
    return tuple(shards)


def _refuse(top: list[str]) -> tuple[str, ...]:
    pickles = [name for name in top if Path(name).suffix in _PICKLES and not name.startswith(_NOT_THE_MODEL)]
    if pickles:
        raise ModelUnsafe(
            f"the only weights are pickles ({', '.join(pickles[:3])}), which can run code when they are read. Ask its "
            "author for safetensors, or convert it yourself."
        )
    if any(name.startswith("adapter_model") for name in top):
        raise ModelMalformed("the files are an adapter; name the model that it was made for")
    others = {kind for name in top if (kind := _OTHERS.get(Path(name).suffix))}
    found = f" Its weights are for {', '.join(sorted(others))}." if others else ""
    raise ModelMalformed(f"the model has no safetensors weights.{found} Name a repository that has them.")
