"""Reads single tensors out of safetensors files without mapping them.

A mapped file's pages count as the process's resident memory once touched, so a mapping kept open over a whole model
would let peak memory grow with its number of blocks. Here a tensor is read into memory of its own and the file closed.
The header is checked as the format's specification asks, since files come from strangers.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from squeeze.errors import ModelMalformed

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own bound


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file; offsets in bytes from the file's start."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file by name; raises ModelMalformed, naming file and fault."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise ModelMalformed(
                f"{path.name} is not a safetensors file, or is truncated: its header does not fit in it"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise ModelMalformed(f"{path.name} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise ModelMalformed(f"{path.name}: the safetensors header is not an object")
    return {
        name: _entry(path, name, fields, 8 + length, size_bytes)
        for name, fields in header.items()
        if name != "__metadata__"
    }


def read(entry: Entry) -> Tensor:
    """The tensor, in memory of its own, as stored."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if tensor.numel() == 0:
        return tensor
    flat = tensor.view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        view, done = flat.numpy().data, 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise ModelMalformed(f"{entry.path.name} ended while a tensor was read: download it again")
            done += count
    return tensor


def _entry(path: Path, name: str, fields: object, base: int, size_bytes: int) -> Entry:
    try:
        assert isinstance(fields, dict)
        dtype = DTYPES[fields["dtype"]]
        shape = tuple(int(n) for n in fields["shape"])
        start, end = (int(n) for n in fields["data_offsets"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ModelMalformed(f"{path.name}: the entry of tensor {name!r} can't be read") from error
    if (
        min(shape, default=0) < 0
        or end - start != math.prod(shape) * dtype.itemsize
        or start < 0
        or base + end > size_bytes
    ):
        raise ModelMalformed(f"{path.name}: tensor {name!r} does not lie in the file; it is truncated or damaged")
    return Entry(path, dtype, shape, base + start, base + end)
