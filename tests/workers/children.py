"""What the fork server runs in place of a job, where a test needs one that is slow, nasty or quick.

`spec.metadata["do"]` chooses. Nothing here imports torch, so that these servers start at once.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from squeeze.objects import Result, Stage
from storage import open_storage
from workers.alone import take
from workers.channel import Channel, Teller
from workers.crew import Crew
from workers.request import Request

RESULT = Result(source_bytes=1000, result_bytes={"gptq": 300}, compression_ratio=3.3, bits_per_weight=4.2)
FIGURES = {"peak_host_bytes": 123, "peak_gpu_bytes": 0, "gpu_seconds": 0.0}


def run(channel: Channel) -> int:
    request = Request.of(channel.receive())
    deed: Callable[[Request, Channel], int] = globals()[request.spec["metadata"]["do"]]
    with take(request.scratch_path):
        (request.scratch_path / "child").write_text(str(os.getpid()))
        return deed(request, channel)


def succeed(request: Request, channel: Channel) -> int:
    teller = Teller(channel)
    teller.stage(Stage.uploading)
    artifacts = store(request, f"made by attempt {request.attempt}\n")
    channel.send({"done": {"artifacts": artifacts, "result": RESULT.model_dump(), "report": {}}, "figures": FIGURES})
    return 0


def sleep(request: Request, channel: Channel) -> int:
    Teller(channel).stage(Stage.compressing)
    return wait_for_ever()


def stubborn(request: Request, channel: Channel) -> int:
    """Ignores SIGTERM and has a grandchild that does so too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    (request.scratch_path / "grandchild").write_text(str(grandchild.pid))
    Teller(channel).stage(Stage.compressing)
    return wait_for_ever()


def stubborn_once(request: Request, channel: Channel) -> int:
    return stubborn(request, channel) if request.attempt == 1 else succeed(request, channel)


def sleep_once(request: Request, channel: Channel) -> int:
    return sleep(request, channel) if request.attempt == 1 else succeed(request, channel)


def wait_in_upload(request: Request, channel: Channel) -> int:
    Teller(channel).stage(Stage.uploading)
    store(request, "half of a result")
    return wait_for_ever()


def wait_in_upload_once(request: Request, channel: Channel) -> int:
    return wait_in_upload(request, channel) if request.attempt == 1 else succeed(request, channel)


def succeed_and_hang(request: Request, channel: Channel) -> int:
    succeed(request, channel)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return wait_for_ever()


def crash(request: Request, channel: Channel) -> int:
    os.environ["LEFT"] = "nothing is cleaned up"
    raise RuntimeError(f"no word, and the secret {os.environ['HF_TOKEN']} in the last line")


def fail(request: Request, channel: Channel) -> int:
    channel.send(
        {
            "failed": {"code": "not_finite", "message": f"NaN; {os.environ['HF_TOKEN']}", "param": "steps.0"},
            "traceback": f"secret {os.environ['HF_TOKEN']}",
            "figures": FIGURES,
        }
    )
    return 1


def tell(request: Request, channel: Channel) -> int:
    """Progress, faster than anybody wants to read it, and a secret."""
    teller = Teller(channel)
    for stage in (Stage.pulling, Stage.compressing):
        teller.stage(stage)
        for done in range(2001):
            teller.advance(done, 2000, "blocks")
    teller.revision("0" * 40)
    teller.event("warning", f"secret {os.environ['HF_TOKEN']}", layer="q_proj")
    return succeed(request, channel)


def share_and_fail(request: Request, channel: Channel) -> int:
    """The second of two processes fails and says why."""

    return _share(request, channel, lambda rank, last_word: fail(request, last_word))


def share_once(request: Request, channel: Channel) -> int:
    return share(request, channel) if request.attempt == 1 else succeed(request, channel)


def share(request: Request, channel: Channel) -> int:
    """Two processes, both at work for ever."""
    return _share(request, channel, lambda rank, last_word: wait_for_ever())


def share_and_raise(request: Request, channel: Channel) -> int:
    """The second of two processes ends by an exception that nobody takes."""

    def raise_(rank: int, last_word: Channel) -> int:
        raise RuntimeError("out of the second process")

    return _share(request, channel, raise_)


def share_and_succeed(request: Request, channel: Channel) -> int:
    """The second process ends long before the first, and well."""
    crew = Crew(1, lambda rank, last_word: 0, channel)
    crew.blame()
    return succeed(request, channel)


def _share(request: Request, channel: Channel, serve: Callable[[int, Channel], int]) -> int:
    def noted(rank: int, last_word: Channel) -> int:
        (request.scratch_path / "second").write_text(str(os.getpid()))
        return serve(rank, last_word)

    Crew(1, noted, channel)
    Teller(channel).stage(Stage.compressing)
    return wait_for_ever()


def wait_for_ever() -> int:
    while True:
        time.sleep(1000)


def store(request: Request, text: str) -> list[dict[str, Any]]:
    path = Path(request.scratch) / "result.txt"
    path.write_text(text)
    key = f"{request.prefix}/gptq/result.txt"
    stored = open_storage(request.storage_url).put_file(key, path)
    return [
        {
            "filename": "gptq/result.txt",
            "bytes": stored.size_bytes,
            "sha256": stored.sha256,
            "format": "gptq",
            "storage_key": key,
        }
    ]
