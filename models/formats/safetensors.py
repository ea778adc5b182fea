"""A plain transformers directory in a 16-bit type: every floating-point tensor of the source, cast.

Tensors keep their names and order. What is no floating-point number, or what transformers keeps in float32 whatever the
model's type, is copied.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from models.casts import castable
from models.checkpoint import SourceModel, open_model
from models.formats.directory import without_private, write_companions, write_json, written_whole
from models.formats.shards import SHARD_BYTES, Piece, write_shards
from models.frame import Frame
from models.plain import TYPES, Plain, saturated
from models.progress import Notify
from models.quantized import QuantizedModel, Site
from squeeze.schemes import Element, Scheme
from squeeze.shapes import COMPUTED


def refuse(sites: Iterable[Site], schemes: Mapping[str, Scheme]) -> None:
    """It holds whatever transformers loads."""


def write(
    source: SourceModel, quantized: QuantizedModel, out: Path, notify: Notify, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a directory that every loader of the source loads as it is.

    Read from the source, not from the codes: a cast of a tensor is the same wherever it is made, and embeddings and
    norms, which the engine does not compress, are cast as well.
    """
    dtype = TYPES[quantized.step.scheme().element]
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
    element: Element = "float16" if weight.dtype == torch.float16 else "bfloat16"
    return Plain(weight.t().contiguous() if site.transposed else weight, Scheme(element, 16, "channel"))


def _piece(source: SourceModel, name: str, dtype: torch.dtype) -> Piece:
    return Piece({name: (dtype, source.entries[name].shape)}, lambda: {name: saturated(source.tensor(name), dtype)})
