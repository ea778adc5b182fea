"""Distillation from logits: what the teacher says is what it says whole, is kept, and the student comes to say it."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models.distill import teacher as reading
from models.distill.held_out import apart, read_held_out
from models.distill.stored import STORY, Shape, asked
from models.files.checkpoint import open_model
from models.pipeline import run
from models.streaming.frame import Frame
from models.train.checkpoints import Checkpoints, Story
from models.train.loop import train
from models.train.packing import batch_of
from models.train.scoring import learned_logits
from models.train.task import accelerator_of
from tests.models.distill.parts import inputs_of, teacher
from tests.models.job_parts import Heard
from tests.models.tiny import VOCABULARY
from tests.models.train.parts import begin, go_on, seen

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher(tmp_path_factory.mktemp("teacher"))


def frame_of(model: Path) -> Frame:
    return Frame(open_model(model), torch.float32, torch.device("cpu"))


def test_what_is_kept_of_the_teacher_is_what_it_says_whole(tmp_path: Path, model: Path) -> None:
    prepared, task = begin(inputs_of({"top_k": 8, "temperature": 2.0}, model, tmp_path))
    examples = prepared.split.train
    shape = Shape(int(examples.scored.sum()), 8, VOCABULARY)
    stored = asked(frame_of(model), examples, shape, 2.0, tmp_path / "says", "mark", Heard(), memory_bytes=0)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for rows in task.plan.batch(0), task.plan.batch(1):
        batch = batch_of(examples, rows)
        assert len(rows[0]) > 1  # several examples to a sequence, which the teacher read one by one
        p = (learned_logits(whole, batch, packed=True) / 2.0).log_softmax(-1)
        ids, logs = stored.of(batch)
        wanted = p.topk(8, dim=-1)
        torch.testing.assert_close(logs[:, :8].detach(), wanted.values.detach(), rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(p.gather(-1, ids).detach(), wanted.values.detach(), rtol=0, atol=1e-4)
        torch.testing.assert_close(logs.exp().sum(-1), torch.ones(batch.learned))
    assert (
        shape.bytes_per_token
        == 8 * 4 + 2
        == sum(file.stat().st_size for file in (tmp_path / "says").glob("*.bin")) // shape.tokens
    )
    assert Shape(1, 8, 1 << 17).bytes_per_token == 8 * 6 + 2


def test_a_teacher_that_was_stopped_goes_on_with_the_next_chunk_and_reads_nothing_twice(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK_TOKENS", 300)
    prepared, _ = begin(inputs_of({"top_k": 4}, model, tmp_path))
    examples, heard = prepared.split.train, Heard()
    chunks = reading.chunks_of(examples)
    assert len(chunks) > 2 and [n for chunk in chunks for n in chunk] == list(range(len(examples)))
    shape = Shape(int(examples.scored.sum()), 4, VOCABULARY)
    asked(frame_of(model), examples, shape, 1.0, tmp_path / "whole", "mark", heard)
    whole = [(tmp_path / "whole" / name).read_bytes() for name in ("ids.bin", "logs.bin")]
    (tmp_path / "whole" / STORY).write_text('["mark", 1]')  # as after a kill in the second chunk
    asked(frame_of(model), examples, shape, 1.0, tmp_path / "whole", "mark", heard)
    assert [(tmp_path / "whole" / name).read_bytes() for name in ("ids.bin", "logs.bin")] == whole
    told = len(heard.messages)
    asked(frame_of(model), examples, shape, 1.0, tmp_path / "whole", "mark", heard)
    assert len(heard.messages) == told  # the teacher was not asked again
    asked(frame_of(model), examples, shape, 1.0, tmp_path / "whole", "another", heard)
    assert len(heard.messages) == told + 1


def test_the_held_out_figures_are_those_of_both_models_whole(tmp_path: Path, model: Path) -> None:
    prepared, task = begin(inputs_of(None, model, tmp_path))
    accelerator = accelerator_of(prepared.precision, prepared.device)
    frame = frame_of(model)
    hidden = read_held_out(frame, task.held_out, tmp_path / "held", "mark", Heard())
    found = apart(task, accelerator, frame, hidden, VOCABULARY)
    whole, sums, count = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), torch.zeros(2), 0
    for number in range(len(task.held_out)):
        ids, scored = task.held_out.one(number)
        p, q = (one(input_ids=ids[None].long()).logits[0, :-1].log_softmax(-1) for one in (whole, task.model))
        p, q, targets = (one[scored[1:]] for one in (p, q, ids[1:].long()))
        sums[0] -= p.gather(-1, targets[:, None]).sum().detach()
        sums[1] += (p.exp() * (p - q)).sum().detach()
        count += len(targets)
    assert (found.teacher_loss, found.divergence) == pytest.approx((sums / count).tolist(), rel=1e-4)
    assert 0 <= found.agreement <= 1


@pytest.mark.parametrize(
    "step",
    [{}, {"top_k": "all"}, {"objective": "reverse_kl", "temperature": 2.0}, {"objective": "jsd", "alpha": 1.0}],
    ids=["forward", "whole", "reverse", "jsd"],
)
def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path, model: Path, step: dict[str, Any]) -> None:
    inputs = inputs_of(step, model, tmp_path)
    prepared, task = begin(inputs)
    accelerator = accelerator_of(prepared.precision, prepared.device)
    frame = frame_of(model)
    hidden = read_held_out(frame, task.held_out, tmp_path / "held", "mark", Heard())
    before = apart(task, accelerator, frame, hidden, VOCABULARY)
    story = train(task, accelerator, Checkpoints(inputs.work / "train", prepared.mark), Heard(), 1e9)
    after = apart(task, accelerator, frame, hidden, VOCABULARY)
    assert after.divergence < 0.8 * before.divergence and story.curve[-1].loss < story.curve[0].loss


def test_losses_of_k_outcomes_and_of_all_are_alike_where_k_is_nearly_all(tmp_path: Path, model: Path) -> None:
    firsts = [
        go_on(inputs_of({"top_k": k, "steps": 2, "alpha": 1.0}, model, tmp_path / str(k)))[1].curve[0].loss
        for k in ("all", VOCABULARY - 1, 16)
    ]
    assert firsts[1] == pytest.approx(firsts[0], rel=2e-3) and firsts[2] < firsts[0]


@pytest.mark.slow
def test_a_distillation_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path, model: Path) -> None:
    quiet = go_on(inputs_of({"evaluate_every": 5}, model, tmp_path / "quiet"))[1]
    step = random.randrange(2, 11)
    command = [sys.executable, "-m", "tests.models.distill.killed", str(model), str(tmp_path / "room"), str(step)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    story: Story = go_on(inputs_of({"evaluate_every": 5}, model, tmp_path / "room"))[1]
    assert story.resumed == [step - 1]
    assert seen(story) == seen(quiet) and story.held_out == quiet.held_out


@pytest.mark.slow
def test_a_distillation_ends_with_a_whole_model_that_loses_what_the_report_says(tmp_path: Path, model: Path) -> None:
    inputs = inputs_of({"evaluate_every": 6}, model, tmp_path)
    outcome = run(inputs, Heard())
    training = outcome.report.training
    assert training is not None and training.distillation is not None
    told = training.distillation
    assert training.loss_after < training.loss_before and told.divergence_after < told.divergence_before
    assert told.student == "blocks 0, 3 of the teacher's 4, counted from 0"
    assert told.student_parameters < told.teacher_parameters == outcome.report.source.parameters
    assert told.stored_bytes == 258 * training.data.learned_tokens
    assert training.loss_written == pytest.approx(training.loss_after, rel=1e-2)
    assert [one.outcome for one in outcome.report.certificates] == ["passed", "not checked"]
    assert outcome.result.compression_ratio is not None and outcome.result.compression_ratio > 1
    weights = load_file(outcome.directories["safetensors"] / "model.safetensors")
    assert sum(one.numel() for one in weights.values()) == told.student_parameters


@pytest.mark.slow
def test_what_was_distilled_is_quantized_in_the_same_job_from_generic_text(tmp_path: Path, model: Path) -> None:
    learn = {"kind": "distill", "method": "logits", "student": {"layers": 2}, "steps": 4, "learning_rate": 0.001}
    spec = {"steps": [learn, {"kind": "quantize", "method": "rtn", "group_size": 32}]}
    inputs = inputs_of(None, model, tmp_path, **spec, data={"sequence_length": 48}, evaluation={"samples": 4})
    outcome = run(dataclasses.replace(inputs, calibration_text=None), Heard())
    report, training = outcome.report, outcome.report.training
    assert training is not None and training.data.origin.startswith("standard library of Python")
    assert any("learned from generic text" in one for one in report.warnings)
    assert set(training.loss_quantized) == {"compressed-tensors"} and training.distillation is not None
    assert report.sizes[0].ratio == report.source.bytes / report.sizes[0].weight_bytes
