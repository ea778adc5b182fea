"""What a quantize step leaves in its work directory: the codes of every linear, one file for each decoder block."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from models.codes import Codes
from models.safetensors_file import Entry, read, read_header
from squeeze.steps import Quantize


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


def group_columns(step: Quantize, site: Site) -> int:
    """Input columns of one scale at this site."""
    return site.columns if step.group_size == "channel" else step.group_size


@dataclass(frozen=True)
class QuantizedModel:
    """Codes of a whole model, read a layer at a time.

    sites: the quantized linears by name, in the model's order. ignored: linears of the decoder blocks left in 16 bits.
    dtype: of the source's weights.
    """

    directory: Path
    step: Quantize
    sites: dict[str, Site]
    ignored: tuple[str, ...]
    dtype: torch.dtype
    _entries: dict[str, Entry] = field(default_factory=dict, repr=False)

    def codes(self, name: str) -> Codes:
        """The codes of one layer; reads them from disk."""
        if not self._entries:
            for path in block_files(self.directory):
                self._entries.update(read_header(path))
        codes, scale, zero = (read(self._entries[f"{name}.{part}"]) for part in ("codes", "scale", "zero"))
        step = self.step
        return Codes(codes, scale, zero, step.bits, group_columns(step, self.sites[name]), step.symmetric)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized linears, with 16 bits a scale and, where zero points are stored, `bits` a zero point."""
        weights = overhead = 0
        for site in self.sites.values():
            weights += site.rows * site.columns
            overhead += site.rows * (site.columns // group_columns(self.step, site))
        each = 16 + (0 if self.step.symmetric else self.step.bits)
        return self.step.bits + each * overhead / weights if weights else 16.0


def block_file(directory: Path, index: int) -> Path:
    return directory / f"block-{index:05d}.safetensors"


def block_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("block-*.safetensors"))


def tensors_of(codes: dict[str, Codes]) -> Iterator[tuple[str, Tensor]]:
    """What a block's file holds: `<module>.codes`, `.scale`, `.zero`."""
    for name, one in codes.items():
        yield f"{name}.codes", one.codes
        yield f"{name}.scale", one.scale
        yield f"{name}.zero", one.zero
