"""What a step that compresses leaves in its work directory: the codes of every linear, one file a decoder block."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from models.files.safetensors_file import Entry, read, read_header
from models.weights.codes import Encoded, restored
from squeeze.steps.compressing import Compress
from squeeze.steps.schemes import Scheme

CHANGED = "changed/"  # before the name of a tensor that is no code


@dataclass(frozen=True)
class Site:
    """One linear of a decoder block that is quantized.

    name: the module's name as transformers has it. rows, columns: outputs, inputs.
    transposed: the weight is kept (in, out), as GPT-2's Conv1D does.
    """

    name: str
    rows: int
    columns: int
    transposed: bool


@dataclass(frozen=True)
class QuantizedModel:
    """Codes of a whole model, read a layer at a time.

    sites: the quantized linears by name, in the model's order. schemes: how each is stored. ignored: linears of the
    decoder blocks left in 16 bits. dtype: of the weights that are not quantized.
    """

    directory: Path
    step: Compress
    sites: dict[str, Site]
    schemes: dict[str, Scheme]
    ignored: tuple[str, ...]
    dtype: torch.dtype

    def codes(self, name: str) -> Encoded:
        """The codes of one layer; reads them from disk."""
        return restored({part: read(entry) for part, entry in self._parts[name].items()}, self.schemes[name])

    def part(self, name: str, part: str) -> Tensor:
        """One of the tensors that a layer's codes are made of."""
        return read(self._parts[name][part])

    def changed(self) -> dict[str, Entry]:
        """Tensors by the name of their parameter: what took over a scale, and what the source does not have."""
        return self._parts.get(CHANGED, {})

    @cached_property
    def _parts(self) -> dict[str, dict[str, Entry]]:
        found: dict[str, dict[str, Entry]] = {}
        for path in block_files(self.directory):
            for key, entry in read_header(path).items():
                owner, _, part = (
                    key.rpartition(".") if not key.startswith(CHANGED) else (CHANGED, "", key.removeprefix(CHANGED))
                )
                found.setdefault(owner, {})[part] = entry
        return found

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized linears, scales and zero points shared out."""
        weights = bits = 0.0
        for name, site in self.sites.items():
            weights += site.rows * site.columns
            bits += site.rows * site.columns * self.schemes[name].bits_per_weight(site.columns)
        return bits / weights if weights else 16.0


def block_file(directory: Path, index: int) -> Path:
    return directory / f"block-{index:05d}.safetensors"


def block_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("block-*.safetensors"))


def tensors_of(
    codes: Mapping[str, Encoded], changed: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What a block's file holds: `<module>.codes`, `.scale` and so on, and `changed/<parameter>`."""
    for name, one in codes.items():
        for part, tensor in one.tensors().items():
            yield f"{name}.{part}", tensor.cpu().contiguous()
    for name, tensor in (changed or {}).items():
        yield CHANGED + name, tensor.cpu().contiguous()
