"""Names that stand in requests: of formats, and of models (an id of the Hub, an earlier job, a directory)."""

import re
from typing import Literal

Format = Literal[
    "compressed-tensors", "gptq", "awq", "bitsandbytes", "safetensors", "safetensors-zst", "onnx", "gguf", "peft"
]
HUB_ID = re.compile(r"^(?P<repo>[\w.-]{1,96}/[\w.-]{1,96}|[\w.-]{1,96})(@(?P<revision>[\w./-]{1,128}))?$", re.ASCII)
OWN_ID = re.compile(r"^(job|file)-[0-9a-z]{8,64}$")


def names_a_model(value: str) -> str:
    """The name itself; raises ValueError where it can be none."""
    if value.startswith("/"):
        if "\0" in value:
            raise ValueError("a directory's name can't hold a zero byte")
        return value
    if OWN_ID.match(value):
        if value.startswith("file-"):
            raise ValueError("uploaded models are not taken yet; name a Hub id, a job or a directory")
        return value
    if not HUB_ID.match(value) or ".." in value:
        raise ValueError(
            "name a Hub id (org/name or org/name@revision), an earlier job (job-…) or an absolute directory"
        )
    return value
