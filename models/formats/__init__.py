"""How codes and scales are laid out on disk, one file a format, found by the format's wire name."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from models.files.checkpoint import SourceModel
from models.progress import Notify
from models.weights.codes import Encoded
from models.weights.quantized import QuantizedModel, Site
from squeeze.names import Format
from squeeze.steps.schemes import Scheme


class Layout(Protocol):
    """What every format's module offers."""

    def refuse(self, sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
        """Raises, naming the layer and what would do, where the format can't hold one of these layers."""

    def write(self, source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify) -> None:
        """Writes a whole model directory at `out`; it is there complete or not at all."""

    def read(self, out: Path, module: str) -> Encoded:
        """The codes of one layer, from what `write` wrote."""


def layout(name: Format) -> Layout:
    """The module that writes and reads a format."""
    return cast(Layout, import_module(f"models.formats.{name.replace('-', '_')}"))
