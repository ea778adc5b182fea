"""A model whose own weights were trained, on disk."""

from pathlib import Path
from typing import Any

import torch

from models.checkpoint import SourceModel
from models.formats.directory import without_private, write_companions, write_json, written_whole
from models.formats.shards import SHARD_BYTES
from models.plain import saturated
from models.train.merging import stored_dtype


@torch.no_grad()
def write_trained(model: Any, source: SourceModel, out: Path) -> None:
    """Writes a directory that loads like the source. The model's weights are rounded in place to the source's type.

    transformers writes the weights, since it alone knows how it had fused and tied them while loading.
    """
    dtype = stored_dtype(source)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = saturated(parameter.data, dtype)
    with written_whole(out) as partial:
        model.save_pretrained(partial, max_shard_size=SHARD_BYTES)
        write_companions(source, partial)
        config = without_private(source.config)
        config.pop("torch_dtype", None)
        write_json(partial / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
