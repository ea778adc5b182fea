"""Optimizers that take less memory: what they do to the weights, and that a training goes on to the same bits."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.pipeline import run
from models.train.averages import share
from models.train.checkpoints import Checkpoints
from models.train.loop import train
from models.train.optimizers import BAdam, GaLore, blocks_of, optimizer_of, optimizer_tensors
from models.train.task import accelerator_of
from squeeze.costs.trainable import learned
from squeeze.errors import SpecInvalid
from squeeze.steps.finetuning import Full
from tests.models.job_parts import Heard
from tests.models.tiny import FAMILIES
from tests.models.train.parts import begin, go_on, inputs_for, seen, spec_of

WAYS: dict[str, dict[str, Any]] = {
    "adamw8bit": {"optimizer": "adamw8bit"},
    "galore": {"optimizer": "galore", "projection_rank": 8, "projection_refresh": 5, "projection_scale": 1.0},
    "badam": {"optimizer": "badam", "block_steps": 2},
    "ema": {"ema": 0.7, "evaluate_every": 5},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


def full(**fields: Any) -> Any:
    return spec_of({"method": "full", "learning_rate": 0.003} | fields)


class Ended(Exception):
    """The process went away."""


class Ending(Heard):
    """Ends the training after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def advance(self, done: int, total: int, unit: str) -> None:
        if done == self._step:
            raise Ended


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_falls_and_another_attempt_goes_on_to_the_same_bits(tmp_path: Path, model: Path, way: str) -> None:
    whole_task, whole = go_on(inputs_for(full(**WAYS[way]), model, tmp_path / "whole"))
    assert whole.held_out[-1].loss < 0.9 * whole.held_out[0].loss
    inputs = inputs_for(full(**WAYS[way]), model, tmp_path / "again")
    with pytest.raises(Ended):
        go_on(dataclasses.replace(inputs, snapshot_seconds=0.0), Ending(8))
    task, story = go_on(inputs)
    assert story.resumed == [7] and seen(story) == seen(whole) and story.held_out == whole.held_out
    kept = whole_task.learning
    assert kept.keys() == task.learning.keys() and len(kept) == len(list(task.model.parameters()))
    assert all(torch.equal(one, kept[name]) for name, one in task.learning.items())


def test_each_keeps_less_state_than_adamw(tmp_path: Path, model: Path) -> None:
    sizes = {}
    for name in ("adamw", "adamw8bit", "galore", "badam"):
        spec = full(optimizer=name, projection_rank=8)
        prepared, task = begin(inputs_for(spec, model, tmp_path / name))
        optimizer = optimizer_of(task.step, task.learning)
        if isinstance(optimizer, BAdam):
            optimizer.turn_to(0)
        for one in task.learning.values():
            one.grad = torch.randn_like(one) if one.requires_grad else None
        optimizer.step()
        sizes[name] = sum(one.nbytes for one in optimizer_tensors(optimizer).values())
        assert isinstance(prepared.step, Full)
        shapes = {key: entry.shape for key, entry in prepared.source.entries.items()}
        told = learned(prepared.step, prepared.source.config, shapes).state_bytes
        # Counters of steps come on top; of badam the plan knows the largest block, whose turn this need not be.
        assert 0.97 * told * (name != "badam") < sizes[name] < 1.03 * told
    assert sizes["adamw8bit"] < 0.3 * sizes["adamw"]
    assert sizes["galore"] < 0.6 * sizes["adamw"]  # the embedding and the head, half of this model, keep theirs
    assert sizes["badam"] < 0.6 * sizes["adamw"]


def weights(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    dice = torch.Generator().manual_seed(0)
    return {f"layers.{n}.weight": nn.Parameter(torch.randn(shape, generator=dice)) for n, shape in enumerate(shapes)}


def stepped(
    optimizer: torch.optim.Optimizer, learning: dict[str, nn.Parameter], steps: int, seed: int = 1
) -> list[list[Tensor]]:
    """What each step did to each weight, with the same gradients for all optimizers."""
    dice, done = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        before = [one.detach().clone() for one in learning.values()]
        for one in learning.values():
            one.grad = torch.randn(one.shape, generator=dice)
        optimizer.step()
        done.append([one.detach() - old for one, old in zip(learning.values(), before, strict=True)])
    return done


def test_what_is_not_projected_has_adamw_itself() -> None:
    step = Full(method="full", weight_decay=0.1, learning_rate=0.01)
    changes = []
    for name in ("adamw", "galore"):
        learning = weights((6, 9), (9, 6), (7,))
        optimizer = optimizer_of(step.model_copy(update={"optimizer": name}), learning)  # of rank 128
        changes.append(stepped(optimizer, learning, 5))
    torch.testing.assert_close(*changes)


def test_a_projected_step_is_adamw_s_in_the_space_of_the_largest_singular_vectors() -> None:
    learning = weights((12, 20), (20, 12))
    usual: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = GaLore(learning, rank=3, refresh=2, scale=0.5, **usual)
    (first,) = stepped(optimizer, learning, 1)
    for change, one in zip(first, learning.values(), strict=True):
        assert one.grad is not None
        U, _, Vh = torch.linalg.svd(one.grad)
        wide = change.shape[0] < change.shape[1]
        P = U[:, :3] if wide else Vh[:3]
        expected = P @ (P.t() @ one.grad).sign() if wide else (one.grad @ P.t()).sign() @ P  # AdamW's first step
        torch.testing.assert_close(change, -0.1 * 0.5 * expected, atol=1e-5, rtol=1e-4)
    projectors = [optimizer.state[one]["projector"].clone() for one in learning.values()]
    stepped(optimizer, learning, 1, seed=2)
    assert all(
        torch.equal(optimizer.state[one]["projector"], P) for one, P in zip(learning.values(), projectors, strict=True)
    )
    stepped(optimizer, learning, 1, seed=3)
    assert not any(
        torch.equal(optimizer.state[one]["projector"], P) for one, P in zip(learning.values(), projectors, strict=True)
    )


def test_every_block_has_its_turn_and_what_waits_has_no_state() -> None:
    learning = weights((3, 3), (3, 3), (3, 3)) | {"embed.weight": nn.Parameter(torch.randn(5, 3))}
    blocks = blocks_of(learning)
    assert [len(block) for block in blocks] == [1, 1, 1, 1]
    optimizer = BAdam(blocks, 2, lr=0.1)
    turns = []
    for number in range(16):
        optimizer.turn_to(number)
        active = {name for name, one in learning.items() if one.requires_grad}
        sum((one * one).sum() for one in learning.values()).backward()
        before = {name: one.detach().clone() for name, one in learning.items()}
        optimizer.step()
        assert {name for name, one in learning.items() if not torch.equal(one, before[name])} == active
        assert {name for name, one in learning.items() if optimizer.state.get(one)} == active
        turns += active
    assert set(turns[:8]) == set(turns[8:]) == set(learning) and turns[::2] == turns[1::2]
    optimizer.release()
    assert all(one.requires_grad for one in learning.values())


def test_what_is_kept_is_the_average(tmp_path: Path, model: Path) -> None:
    prepared, task = begin(inputs_for(spec_of({"ema": 0.5}), model, tmp_path))
    average = {name: one.detach().clone() for name, one in task.learning.items()}

    class Averaging(Heard):
        def advance(self, done: int, total: int, unit: str) -> None:
            for name, one in task.learning.items():
                if done:
                    average[name].lerp_(one.detach(), share(0.5, done))

    checkpoints = Checkpoints(prepared.source.path.parent / "averages", "x")
    story = train(task, accelerator_of("fp32", task.device), checkpoints, Averaging(), 1e9)
    assert all(torch.equal(one, average[name]) for name, one in task.learning.items())
    sums, counts = task.held_out_losses(accelerator_of("fp32", task.device))
    assert float(sums.sum() / counts.sum()) == story.held_out[-1].loss
    assert share(0.5, 1) == 1 - 2 / 11 and share(0.999, 100_000) == pytest.approx(0.001)


def scaling(device: torch.device, scale: float) -> Any:
    """fp16 on the CPU, where accelerate computes in float32 unless it is told otherwise."""
    accelerator = accelerator_of("fp16", device)
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def test_a_gradient_that_fp16_can_t_hold_is_computed_again_with_a_smaller_scale(tmp_path: Path, model: Path) -> None:
    stories = []
    for name, scale in (("usual", 2.0**12), ("too large", 2.0**40)):
        prepared, task = begin(inputs_for(spec_of({"dropout": 0.1, "steps": 5, "warmup": 0}), model, tmp_path / name))
        accelerator = scaling(task.device, scale)
        checkpoints = Checkpoints(tmp_path / name / "train", prepared.mark)
        stories.append(train(task, accelerator, checkpoints, Heard(), 1e9))
        found = checkpoints.latest()
        assert found is not None and float(found[1]["scale"]) == accelerator.scaler.get_scale() <= 2.0**20
    usual, large = stories
    assert len(large.curve) == 5 and all(one.gradient_norm < 1e4 for one in large.curve)
    assert [one.loss for one in large.curve] == pytest.approx([one.loss for one in usual.curve], rel=1e-2)
    assert large.held_out[-1].loss < large.held_out[0].loss


@pytest.mark.parametrize(
    ("fields", "param"), [({"optimizer": "paged_adamw8bit"}, "optimizer"), ({"precision": "fp16"}, "precision")]
)
def test_what_only_a_gpu_has_is_refused_before_a_weight_is_read(
    tmp_path: Path, model: Path, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(SpecInvalid, match=r"set limits\.gpus to 1") as refused:
        run(inputs_for(spec_of(fields), model, tmp_path), Heard())
    assert refused.value.param == f"steps.0.{param}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(
    "fields", [{"optimizer": "paged_adamw8bit"}, {"precision": "fp16"}, {"optimizer": "adamw8bit", "precision": "bf16"}]
)
def test_on_a_gpu_the_loss_falls_too_and_another_attempt_goes_on(
    tmp_path: Path, model: Path, fields: dict[str, Any]
) -> None:
    inputs = dataclasses.replace(inputs_for(full(**fields), model, tmp_path), device="cuda")
    with pytest.raises(Ended):
        go_on(dataclasses.replace(inputs, snapshot_seconds=0.0), Ending(8))
    _, story = go_on(inputs)
    assert story.resumed == [7] and story.held_out[-1].loss < 0.9 * story.held_out[0].loss
