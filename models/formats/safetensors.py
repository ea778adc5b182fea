"""A plain transformers directory: of a cast every floating-point tensor in a 16-bit type, of weights that an engine
changed every tensor in its own.

Tensors keep their names and order. Of a cast, what is no floating-point number, or what transformers keeps in float32
whatever the model's type, is copied.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel, open_model
from models.formats.directory import (
    pieces_of,
    skeleton_of,
    without_private,
    write_companions,
    write_json,
    written_whole,
)
from models.formats.shards import SHARD_BYTES, Piece, write_shards
from models.progress import Notify
from models.streaming.frame import Frame
from models.weights.casts import castable
from models.weights.plain import TYPES, Plain, saturated
from models.weights.quantized import QuantizedModel, Site
from squeeze.shapes.model import COMPUTED
from squeeze.steps.schemes import Element, Scheme


def refuse(sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
    """It holds whatever transformers loads."""


def write(
    source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a directory that every loader of the source loads as it is.

    A cast is read from the source, not from the codes: a cast of a tensor is the same wherever it is made, and
    embeddings and norms, which the engine does not compress, are cast as well.
    """
    element = quantized.step.scheme().element
    if element in ("dense", "factored"):
        _write_dense(source, quantized, out, notify, shard_bytes)
        return
    dtype = TYPES[element]
    with written_whole(out) as partial:
        write_companions(source, partial)
        config = without_private(source.config)
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(partial / "config.json", config)
        cast = set(castable(source))
        names = [name for name in source.names() if not COMPUTED.search(name)]
        pieces = [_piece(source, name, dtype if name in cast else source.entries[name].dtype) for name in names]
        write_shards(partial, pieces, notify, shard_bytes)


def read(out: Path, module: str) -> Plain:
    """The weight of one layer, from what `write` wrote; its outputs first, however the model keeps it."""
    model = open_model(out)
    frame = Frame(model, torch.float32, torch.device("cpu"))
    site = next(site for n in range(frame.count) for site in frame.sites(n) if site.name == module)
    weight = model.tensor(model.module_key(module, "weight"))
    elements: dict[torch.dtype, Element] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
    scheme = Scheme(elements.get(weight.dtype, "dense"), 8 * weight.dtype.itemsize, "channel")
    return Plain(weight.t().contiguous() if site.transposed else weight, scheme)


def _write_dense(source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify, shard_bytes: int) -> None:
    """Of a step that changed weights and not their type; what it factored is multiplied out."""

    def site_piece(site: Site) -> Piece:
        name, shape = f"{site.name}.weight", (site.rows, site.columns)

        def make() -> dict[str, Tensor]:
            weight = quantized.codes(site.name).dequantize(quantized.dtype)
            return {name: weight.T.contiguous() if site.transposed else weight}

        return Piece({name: (quantized.dtype, shape[::-1] if site.transposed else shape)}, make)

    with written_whole(out) as partial:
        write_companions(source, partial)
        config = without_private(source.config)
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = str(quantized.dtype).removeprefix("torch.")
        write_json(partial / "config.json", config)
        write_shards(partial, pieces_of(source, skeleton_of(source), quantized, site_piece), notify, shard_bytes)


def _piece(source: SourceModel, name: str, dtype: torch.dtype) -> Piece:
    return Piece({name: (dtype, source.entries[name].shape)}, lambda: {name: saturated(source.tensor(name), dtype)})
