"""A warm process that trains in teams of forked processes, as `tests.models.teammates` quantizes.

    python -m tests.models.train.teammates

A case: `model`, `work` (a room of its own, gone on with where it was left), `step`, `size`; if wanted `records`, how
many there are to learn from, `student`, a model that learns from the first, `snapshot_seconds`, and what happens to
whom once so many steps are done: `signals`: [rank, steps, name], a signal that the leader sends to a process; `spoil`:
steps, after which the leader's embeddings are no numbers. Answers with the curve, the held-out losses and what was
written.
"""

import dataclasses
import hashlib
import math
import os
import signal
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from models.resources import Clock, peak_host_bytes
from models.streaming.team import Team
from models.train import job
from squeeze.steps.training import Train
from tests.models.job_parts import Heard
from tests.models.teammates import serve
from tests.models.train.parts import inputs_for, kinds, seen_in, spec_of, sums


class Disturbing(Heard):
    """Does harm to a process of the team once so many steps are done."""

    def __init__(self, case: dict[str, Any], pids: list[int]) -> None:
        super().__init__()
        self._spoil = case.get("spoil")
        self._rank, self._steps, self._name = case.get("signals", (0, None, ""))
        self._pids = [os.getpid(), *pids]

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "steps" and done == self._steps:
            os.kill(self._pids[self._rank], signal.Signals[self._name])
        if unit == "steps" and done == self._spoil:
            register_module_forward_hook(spoiled)


def spoiled(module: nn.Module, _: Any, output: Any) -> Any:
    return output * math.nan if isinstance(module, nn.Embedding) and module.training else None


def work(case: dict[str, Any], team: Team, pids: list[int]) -> dict[str, Any]:
    """pids: of the others, by rank."""
    spec = spec_of(case["step"], limits={"gpus": team.size if team.size > 1 else 0})
    step = spec.steps[0]
    assert isinstance(step, Train)
    if not team.leads:
        job.follow(team, spec, step)
        return {"peak": peak_host_bytes()}
    rows = sums(case.get("records", 60)) if step.domain_column is None else kinds()
    inputs = inputs_for(spec, Path(case["model"]), Path(case["work"]), rows)
    student = {"student": Path(case["student"]), "student_name": "org/n"} if "student" in case else {}
    inputs = dataclasses.replace(inputs, snapshot_seconds=case.get("snapshot_seconds", 0.0), **student)
    heard = Disturbing(case, pids)
    adapter, whole = inputs.out / "peft", inputs.out / "whole"
    done = job.trained(inputs, step, adapter, whole if step.whole else None, Clock(), heard, team)
    files = sorted(inputs.out.rglob("*.safetensors"))
    return {
        "curve": seen_in(done.training.curve),
        "held_out": [one.loss for one in done.training.held_out],
        "weights": [one.domain_weights for one in done.training.held_out],
        "after": done.training.loss_after,
        "written": done.training.loss_written,
        "resumed": done.training.resumed,
        "sharding": done.training.sharding,
        "messages": heard.messages,
        "files": {str(one.relative_to(inputs.out)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files},
        "peak": peak_host_bytes(),
    }


if __name__ == "__main__":
    serve(work)
