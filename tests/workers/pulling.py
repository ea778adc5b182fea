"""What the fork server runs in place of a job where a test is about the pull alone: pulls, and reports what came."""

import hashlib
import json
import os
from pathlib import Path

from huggingface_hub import constants

from squeeze.errors import ArchitectureUnsupported, SqueezeError
from storage import open_storage
from workers.channel import Channel, Teller
from workers.pull import pull
from workers.request import Request

from .children import FIGURES, RESULT


def run(channel: Channel) -> int:
    request = Request.of(channel.receive())
    wishes = request.spec["metadata"]
    (request.scratch_path / "child").write_text(str(os.getpid()))
    os.environ.pop("HF_TOKEN", None)
    if "token" in wishes:
        os.environ["HF_TOKEN"] = wishes["token"]
    if "endpoint" in wishes:
        constants.ENDPOINT = wishes["endpoint"]
    try:
        pulled = pull(request, request.parsed(), open_storage(request.storage_url), _check, Teller(channel))
    except SqueezeError as error:
        failed = {"code": error.code, "message": error.message, "param": error.param}
        channel.send({"failed": failed, "figures": FIGURES})
        return 1
    report = {
        "directory": str(pulled.directory),
        "name": pulled.name,
        "revision": pulled.revision,
        "license": pulled.license,
        "files": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in pulled.directory.iterdir()
            if path.is_file()
        },
    }
    channel.send({"done": {"artifacts": [], "result": RESULT.model_dump(), "report": report}, "figures": FIGURES})
    return 0


def _check(directory: Path) -> None:
    if json.loads((directory / "config.json").read_text()).get("model_type") == "unheard-of":
        raise ArchitectureUnsupported("nobody knows it")
