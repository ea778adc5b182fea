"""Which tensors a model has, read from the headers of its safetensors files; never their contents."""

import json
from dataclasses import dataclass
from math import prod
from typing import Any

from api.sources import Files
from squeeze.errors import ModelMalformed
from squeeze.shapes import adapters
from squeeze.shapes.model import MOST, linear_of

CONFIG_BYTES = 1 << 20
INDEX_BYTES = 64 << 20
HEADER_BYTES = 32 << 20
SHARDS = 512
TOKENIZER_BYTES = 16 << 20
CONFIG = "config.json"
TOKENIZER = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
INDEX = "model.safetensors.index.json"

_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
}


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.elements * _DTYPE_BITS.get(self.dtype, 16) // 8


@dataclass(frozen=True)
class Linear:
    """A linear layer of a decoder block: what a quantization changes."""

    name: str
    rows: int
    columns: int
    size_bytes: int


def config_of(files: Files) -> dict[str, Any]:
    """The model's config.json."""
    if CONFIG not in files.sizes:
        raise ModelMalformed("The model has no config.json.", param="model")
    return _object(files, CONFIG, CONFIG_BYTES)


def has_chat_template(files: Files) -> bool:
    """Whether the model says how a chat is written."""
    if TEMPLATE in files.sizes:
        return True
    return TOKENIZER in files.sizes and bool(_object(files, TOKENIZER, TOKENIZER_BYTES).get("chat_template"))


def tensors_of(files: Files) -> dict[str, Tensor]:
    """Every tensor by name; empty where the model has no safetensors files."""
    return _headers(files, _shards(files))


def adapter_of(files: Files) -> dict[str, Any] | None:
    """The settings of an adapter in peft's layout; None where the files are a whole model's."""
    alone = adapters.CONFIG in files.sizes and CONFIG not in files.sizes
    return _object(files, adapters.CONFIG, CONFIG_BYTES) if alone else None


def adapter_tensors_of(files: Files) -> dict[str, Tensor]:
    """Every tensor of an adapter by name."""
    if adapters.WEIGHTS not in files.sizes:
        raise ModelMalformed(f"The adapter has no {adapters.WEIGHTS}; ask for it as safetensors.", param="model")
    return _headers(files, [adapters.WEIGHTS])


def _headers(files: Files, shards: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in shards:
        size = int.from_bytes(files.read(shard, 0, 8), "little")
        if not 2 <= size <= min(HEADER_BYTES, files.sizes[shard]):
            raise ModelMalformed(
                f"{shard} is no safetensors file: its header can't have {size:,} bytes.", param="model"
            )
        header = _parsed(shard, files.read(shard, 8, 8 + size))
        for name, entry in header.items():
            if name != "__metadata__":
                found[name] = _tensor(shard, name, entry)
    return found


def linears_of(tensors: dict[str, Tensor], *, transposed: bool) -> list[Linear]:
    """The linear layers of the decoder blocks. `transposed`: GPT-2 keeps (in, out)."""
    found = []
    for name, tensor in tensors.items():
        linear = linear_of(name, tensor.shape)
        if linear is not None:
            rows, columns = reversed(tensor.shape) if transposed else tensor.shape
            found.append(Linear(linear, rows, columns, tensor.size_bytes))
    return found


def _shards(files: Files) -> list[str]:
    if INDEX in files.sizes:
        mapped = _object(files, INDEX, INDEX_BYTES).get("weight_map")
        names = sorted({str(name) for name in mapped.values()}) if isinstance(mapped, dict) else []
    else:
        names = [name for name in ("model.safetensors",) if name in files.sizes]
    missing = [name for name in names if name not in files.sizes]
    if missing:
        raise ModelMalformed(f"The model's index names {missing[0]}, which is not there.", param="model")
    if len(names) > SHARDS:
        raise ModelMalformed(f"The model has {len(names)} weight files, more than {SHARDS}.", param="model")
    return names


def _object(files: Files, name: str, most_bytes: int) -> dict[str, Any]:
    if files.sizes[name] > most_bytes:
        raise ModelMalformed(f"{name} has {files.sizes[name]:,} bytes, far too many.", param="model")
    return _parsed(name, files.read(name, 0, files.sizes[name]))


def _parsed(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelMalformed(f"{name} can't be read: it holds no JSON.", param="model") from error
    if not isinstance(value, dict):
        raise ModelMalformed(f"{name} can't be read: it holds no JSON object.", param="model")
    return value


def _tensor(shard: str, name: str, entry: Any) -> Tensor:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or not all(type(side) is int and 0 <= side <= MOST for side in shape):
        raise ModelMalformed(f"{shard} can't be read: its header does not describe {name}.", param="model")
    return Tensor(str(entry.get("dtype")), tuple(shape))
