"""`auto` in a whole training: what was chosen, told and kept."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.pipeline import run
from models.train.choices import FILE, try_micro_batch
from models.train.packing import Batch
from models.train.scoring import learned_losses
from models.train.task import accelerator_of
from tests.models import tiny
from tests.models.job_parts import Heard, digests
from tests.models.train.killed_choosing import asked
from tests.models.train.parts import begin, inputs_for, seen_in, spec_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama"))


def test_everything_that_says_auto_is_found_told_and_the_same_after_kill_9(model: Path, tmp_path: Path) -> None:
    heard = Heard()
    quiet = run(inputs_for(asked(), model, tmp_path / "quiet"), heard)
    training = quiet.report.training
    assert training is not None
    found = {one.name: one.value for one in training.chosen}
    assert found["sequence_length"] == training.sequence_length == 64
    assert found["learning_rate"] == 1e-3 == max(one.learning_rate for one in training.curve)
    assert found["micro_batch_size"] == found["batch_size"]
    assert {one.name: one.why for one in training.chosen}["micro_batch_size"].startswith("tried: ")
    for name in found:
        assert any(message.startswith(f"{name} ") for message in heard.messages), name

    room = tmp_path / "killed"
    killed = subprocess.run([sys.executable, "-m", "tests.models.train.killed_choosing", model, room, "7"], check=False)
    assert killed.returncode == -9
    work = room / "work" / "train"
    [checkpoint] = work.glob("checkpoint-*[0-9]")
    assert (checkpoint / FILE).read_text() == (work / FILE).read_text()
    told = json.loads((work / FILE).read_text())
    # What the next attempt would find in less memory, or among other examples, must not matter.
    changed = [one | {"why": "kept"} for one in told["choices"]]
    (work / FILE).write_text(json.dumps(told | {"choices": changed}))
    again = run(inputs_for(asked(), model, room), Heard())
    assert again.report.training is not None
    assert again.report.training.resumed
    assert {one.why for one in again.report.training.chosen} == {"kept"}
    assert seen_in(again.report.training.curve) == seen_in(training.curve)
    assert digests(room / "out") == digests(tmp_path / "quiet" / "out")


def test_what_another_request_left_is_not_taken(model: Path, tmp_path: Path) -> None:
    inputs = inputs_for(asked(), model, tmp_path)
    (inputs.work / "train").mkdir(parents=True)
    left = {"asked": "another", "choices": [{"name": "sequence_length", "value": 16, "why": "left"}]}
    (inputs.work / "train" / FILE).write_text(json.dumps(left))
    training = run(inputs, Heard()).report.training
    assert training is not None and training.sequence_length == 64


def test_a_micro_batch_that_memory_does_not_hold_is_halved_and_trying_leaves_no_trace(
    model: Path, tmp_path: Path
) -> None:
    spec = spec_of({"batch_size": 8, "micro_batch_size": "auto"})
    prepared, task = begin(inputs_for(spec, model, tmp_path))
    assert prepared.choices is not None and task.step.together == 8

    def greedy(called: Any, batch: Batch, *, packed: bool) -> Tensor:
        if len(batch.ids) > 2:
            raise torch.OutOfMemoryError("so many don't fit")
        return learned_losses(called, batch, packed=packed)

    before = torch.get_rng_state()
    accelerator = accelerator_of("fp32", task.device)
    short = dataclasses.replace(task, objective=greedy)
    assert try_micro_batch(prepared.choices, short, accelerator, prepared.source, Heard()) == 2
    assert prepared.choices.made[0].value == 2 and "twice as many don't" in prepared.choices.made[0].why
    assert torch.equal(torch.get_rng_state(), before)
    assert all(one.grad is None for one in task.learning.values())
    assert prepared.rechosen(spec, spec.steps[0]).step.together == 2  # type: ignore[arg-type]
