"""A warm process that runs the engine in teams of forked processes, so that tests pay for its imports once.

    python -m tests.models.teammates

Reads a case a line and answers each with a line: for every process of the team, by rank, what it `says` (an error, or
that it is done; nothing where it was killed), its exit `status`, and the leader's `divergence`. A case is a JSON
object: `model`, `work`, `step`, `size` of the team; if wanted `modules` to import before it, `answer_seconds`,
`samples`, `memory_bytes` as the engine has it, and `signals`: [rank, blocks, name], what the leader sends to a process
once so many blocks are done.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import TypeAdapter

from models.files.checkpoint import open_model
from models.measuring.evaluation import measure
from models.progress import Silent
from models.streaming.team import Team
from models.streaming.teamwork import follow, frames_of, lead
from squeeze.steps.every import Step
from squeeze.steps.quantization import Quantize
from tests.models.engine_parts import CPU, thrown

MODELING = ("transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral")
ANSWER_SECONDS = 120.0

Work = Callable[[dict[str, Any], Team, list[int]], dict[str, Any]]


class Signalling(Silent):
    """Sends a signal to one of the processes once so many blocks are done."""

    def __init__(self, pids: list[int], rank: int, blocks: int, name: str) -> None:
        self.pid, self.blocks, self.number = [os.getpid(), *pids][rank], blocks, signal.Signals[name]

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "blocks" and done == self.blocks:
            os.kill(self.pid, self.number)


def work(case: dict[str, Any], team: Team, pids: list[int]) -> dict[str, Any]:
    """pids: of the others, by rank."""
    step: Quantize = TypeAdapter(Step).validate_python(case["step"])
    if not team.leads:
        follow(team, step)
        return {}
    model = Path(case["model"])
    frames = frames_of(open_model(model), step, CPU)
    calibration, windows = thrown(case.get("samples", 48)).ids, thrown(5)
    done = lead(
        team,
        frames,
        step,
        calibration if step.needs_calibration else None,
        windows,
        Path(case["work"]),
        "",
        Signalling(pids, *case["signals"]) if "signals" in case else Silent(),
        snapshot_seconds=0.0,
        memory_bytes=case.get("memory_bytes"),
    )
    activations = done.activations
    measured = measure(frames.result, windows, activations.original, activations.compressed, Silent())
    return {"divergence": measured.quality.divergence_nats}


def be(work: Work, rank: int, case: dict[str, Any], store: Path, pids: list[int], says: int) -> NoReturn:
    """One process of a team, which ends with it."""
    status = 1
    try:
        torch.set_num_threads(1)
        team = Team.meeting_at(store, rank, case["size"], "cpu", case.get("answer_seconds", ANSWER_SECONDS))
        told = {"says": "done"} | work(case, team, pids)
        status = 0
    except Exception as error:  # noqa: BLE001 - whatever it was, the test judges it
        told = {"says": f"{type(error).__name__}: {error}"}
    os.write(says, json.dumps(told).encode())
    os._exit(status)


def run(work: Work, case: dict[str, Any], store: Path) -> list[dict[str, Any]]:
    pids: list[int] = []
    pipes: list[int] = []
    for rank in reversed(range(case["size"])):  # the leader last: it knows the others
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            be(work, rank, case, store, pids, writing)
        os.close(writing)
        pids.insert(0, pid)
        pipes.insert(0, reading)
    answers = []
    for pid, reading in zip(pids, pipes, strict=True):
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
        for stopped in pids[1:] if pid == pids[0] else ():
            os.kill(stopped, signal.SIGCONT)
        answers.append((json.loads(said) if said else {"says": ""}) | {"status": os.waitstatus_to_exitcode(status)})
    return answers


def serve(work: Work) -> None:
    """Until no case comes any more. work: of each process of a team."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        for number, line in enumerate(sys.stdin):
            case = json.loads(line)
            for name in (*MODELING, *case.get("modules", ())):  # once, for all teams
                importlib.import_module(name)
            room = Path(case["work"]).parent
            room.mkdir(parents=True, exist_ok=True)
            answers.write(json.dumps(run(work, case, room / f"store-{os.getpid()}-{number}")) + "\n")
            answers.flush()


if __name__ == "__main__":
    serve(work)
