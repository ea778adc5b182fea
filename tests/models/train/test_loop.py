"""The loop: stopped and gone on with to the same bits, ended by NaN, by patience, the same however a batch is cut."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.train.checkpoints import Checkpoints, Story
from models.train.loop import train
from models.train.packing import batch_of
from models.train.scoring import learned_losses
from models.train.task import accelerator_of
from squeeze.errors import NotFinite
from tests.models.job_parts import Heard
from tests.models.tiny import FAMILIES
from tests.models.train.killed import RESTLESS, Suicidal
from tests.models.train.parts import begin, go_on, inputs_for, seen, spec_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Story:
    return go_on(inputs_for(spec_of(RESTLESS), model, tmp_path_factory.mktemp("quiet")))[1]


def test_a_training_that_was_killed_goes_on_to_the_same_bits(tmp_path: Path, model: Path, quiet: Story) -> None:
    step = random.randrange(2, 11)
    command = [sys.executable, "-m", "tests.models.train.killed", str(model), str(tmp_path), str(step)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    # It had saved before the step that it died after: a checkpoint holds weights that gave a finite loss.
    _, story = go_on(inputs_for(spec_of(RESTLESS), model, tmp_path))
    assert story.resumed == [step - 1]
    assert alike(story, quiet)


def test_a_training_that_is_asked_to_end_saves_what_it_has_and_ends_as_it_would_have(
    tmp_path: Path, model: Path, quiet: Story
) -> None:
    inputs, step, caught = inputs_for(spec_of(RESTLESS), model, tmp_path), random.randrange(2, 11), []
    before = signal.signal(signal.SIGTERM, lambda *_: caught.append(True))
    try:
        with pytest.raises(SystemExit):
            go_on(dataclasses.replace(inputs, snapshot_seconds=1e9), Suicidal(step, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [True]
    _, story = go_on(inputs)
    assert story.resumed == [step]
    assert alike(story, quiet)


def alike(story: Story, other: Story) -> bool:
    """To the bit, in all that doesn't tell of time and memory."""
    return seen(story) == seen(other) and story.held_out == other.held_out


def test_the_loss_falls_and_what_is_told_is_what_happened(quiet: Story, model: Path, tmp_path: Path) -> None:
    assert [one.step for one in quiet.curve] == list(range(1, 13))
    assert quiet.curve[0].learning_rate == 0 and max(one.learning_rate for one in quiet.curve) == 0.01
    assert quiet.held_out[-1].loss < 0.9 * quiet.held_out[0].loss
    heard = Heard()
    go_on(inputs_for(spec_of({"steps": 3}), model, tmp_path), heard)
    assert heard.messages[0].startswith("held-out loss after 0 steps")
    assert any(message.startswith("step 3 of 3: loss") for message in heard.messages)


def test_a_loss_that_is_no_number_ends_it_at_that_step_and_the_last_good_checkpoint_stays(
    tmp_path: Path, model: Path
) -> None:
    inputs = inputs_for(spec_of({"steps": 6}), model, tmp_path)
    prepared, task = begin(inputs)
    checkpoints = Checkpoints(inputs.work / "train", prepared.mark)

    class Spoiling(Heard):
        """Has a weight overflow after the third step, as a learning rate that is too high does."""

        def advance(self, done: int, total: int, unit: str) -> None:
            if done == 3:
                with torch.no_grad():
                    next(iter(task.learning.values())).fill_(3e38)

    with pytest.raises(
        NotFinite, match=r"at step 4 of the training; the checkpoint after step 2 is kept.*learning_rate"
    ):
        train(task, accelerator_of("fp32", prepared.device), checkpoints, Spoiling(), 0.0)
    found = checkpoints.latest()
    assert found is not None
    story, tensors = found
    assert story.done == 2 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_it_stops_where_the_held_out_loss_falls_no_more_and_keeps_the_weights_of_the_lowest(
    tmp_path: Path, model: Path
) -> None:
    hasty = {"steps": 60, "learning_rate": 0.3, "schedule": "constant", "evaluate_every": 2, "patience": 2, "warmup": 0}
    task, story = go_on(inputs_for(spec_of(hasty), model, tmp_path))
    best = story.best()
    assert story.stopped is not None and story.done < 60 and best is not None
    assert [one.step for one in story.held_out if one.step > best.step] == [best.step + 2, best.step + 4]
    sums, counts = task.held_out_losses(accelerator_of("fp32", task.device))
    assert float(sums.sum() / counts.sum()) == best.loss == min(one.loss for one in story.held_out[1:])


def test_micro_batches_and_checkpointed_activations_change_nothing_but_rounding(tmp_path: Path, model: Path) -> None:
    ways = [{}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"activation_checkpointing": True}]
    curves = [go_on(inputs_for(spec_of({"steps": 4} | way), model, tmp_path / str(n)))[1] for n, way in enumerate(ways)]
    for other in curves[1:]:
        assert [one.loss for one in other.curve] == pytest.approx([one.loss for one in curves[0].curve], abs=1e-4)


def test_checkpointed_activations_are_computed_twice_for_the_same_gradient(tmp_path: Path, model: Path) -> None:
    entered, gradients = [], []
    for checkpointing in (False, True):
        _, task = begin(inputs_for(spec_of({"activation_checkpointing": checkpointing}), model, tmp_path))
        times: list[bool] = []
        task.model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_, to=times: to.append(True))
        task.model.train()
        batch = batch_of(task.examples, task.plan.batch(0))
        learned_losses(task.model, batch, packed=task.packed).sum().backward()
        entered.append(len(times))
        gradients.append([one.grad for one in task.learning.values()])
    assert entered == [1, 2]
    torch.testing.assert_close(*gradients)


def test_in_bfloat16_what_learns_stays_in_float32(tmp_path: Path, model: Path) -> None:
    task, story = go_on(inputs_for(spec_of({"precision": "bf16", "steps": 8}), model, tmp_path))
    assert {one.dtype for one in task.learning.values()} == {torch.float32}
    assert task.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert story.held_out[-1].loss < story.held_out[0].loss


def test_what_another_recipe_left_is_not_gone_on_with(tmp_path: Path, model: Path) -> None:
    go_on(inputs_for(spec_of({"steps": 2}), model, tmp_path))
    _, story = go_on(inputs_for(spec_of({"steps": 3}), model, tmp_path))
    assert story.resumed == [] and story.done == 3
    told = json.loads(next((tmp_path / "work" / "train").glob("checkpoint-*/state.json")).read_text())
    assert len(told["curve"]) == 3
