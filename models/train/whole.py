"""A whole model, from disk to be trained and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from models.files.checkpoint import SourceModel
from models.formats.directory import without_private, write_companions, write_json, written_whole
from models.formats.shards import SHARD_BYTES
from models.train.merging import stored_dtype
from models.weights.plain import saturated


def load_whole(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """A model directory's whole model on a device, nothing of it to learn."""
    transformers_logging.disable_progress_bar()  # a worker's log is no terminal
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    model.config.use_cache = False
    return model.to(device).eval().requires_grad_(False)


@torch.no_grad()
def write_trained(
    model: Any, source: SourceModel, out: Path, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Writes a directory that loads like the source. The model's weights are rounded in place to the source's type.

    settings: what differs from the source's, by the file that it stands in.

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
        for name, changed in (settings or {}).items():
            file = partial / name
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            write_json(file, known | dict(changed))
