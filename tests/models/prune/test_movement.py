"""Movement pruning: gradients against autograd, zeros counted, a training that was torn goes on to the same bits."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from models.files.checkpoint import open_model
from models.pipeline import check, run
from models.prune.movement import Scores, lowest_scores
from models.prune.zeroing.masks import lowest_of_layer
from models.train.checkpoints import Checkpoints
from models.train.loop import train
from models.train.packing import batch_of
from models.train.scoring import learned_losses
from models.train.task import Task, accelerator_of
from squeeze.errors import ArchitectureUnsupported, ModelMalformed, SpecInvalid
from squeeze.reports.report import Report
from tests.models.engine_parts import frame_of
from tests.models.job_parts import Heard
from tests.models.test_rounds import Torn
from tests.models.tiny import FAMILIES
from tests.models.train.parts import QUICK, begin, go_on, inputs_for, seen, spec_of
from tests.models.train.test_zeros import pruned

MOVEMENT = {"kind": "prune", "method": "movement"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


def scored(task: Task) -> Scores:
    """With scores as a training leaves them somewhere: drawn."""
    scores, dice = task.beside, torch.Generator().manual_seed(1)
    assert isinstance(scores, Scores)
    for S in scores.scores:
        S.data.normal_(generator=dice)
    return scores


@pytest.mark.parametrize(
    ("family", "fields"), [("llama", {}), ("llama", {"pattern": "2:4"}), ("gpt2", {"pattern": "2:4"})]
)
def test_gradients_are_those_of_autograd_straight_through_the_mask(
    tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    source = FAMILIES[family](tmp_path / "model")
    prepared, task = begin(inputs_for(spec_of(MOVEMENT | fields), source, tmp_path / "room"))
    scores = scored(task)
    batch = batch_of(task.examples, task.plan.batch(0)[:2])
    parameters = {name: one.detach().clone().requires_grad_() for name, one in task.model.named_parameters()}
    beside = {
        f"{site.name}.weight": S.detach().clone().requires_grad_()
        for site, S in zip(prepared.sites, scores.scores, strict=True)
    }
    masked = dict(parameters)
    for name, S in beside.items():
        M = reference_mask(S.detach(), "pattern" in fields, transposed=family == "gpt2")
        masked[name] = parameters[name] * (M + S - S.detach())
    whole = _Called(task.model, masked)
    learned_losses(whole, batch, packed=task.packed).mean().backward()
    with scores.in_place(12):
        inside = {name: one.detach().clone() for name, one in task.model.named_parameters()}
        learned_losses(task.model, batch, packed=task.packed).mean().backward()
    scores.straight_through()
    for name, one in task.model.named_parameters():
        assert torch.equal(one, parameters[name]), "what is beneath the masks stays"
        torch.testing.assert_close(inside[name], masked[name].detach())
        torch.testing.assert_close(one.grad, parameters[name].grad)
    for S, (name, expected) in zip(scores.scores, beside.items(), strict=True):
        torch.testing.assert_close(S.grad, expected.grad)
        assert (expected.grad[masked[name] == 0] != 0).float().mean() > 0.9, "a weight that is zero can come back"


class _Called:
    """A model with other parameters, as far as losses ask of it."""

    def __init__(self, model: Any, parameters: dict[str, Tensor]) -> None:
        self._model, self._parameters = model, parameters
        self.get_output_embeddings = model.get_output_embeddings

    def __call__(self, **given: Any) -> Any:
        return functional_call(self._model, self._parameters, kwargs=given, tie_weights=True)


def reference_mask(S: Tensor, two_of_four: bool, *, transposed: bool) -> Tensor:
    """1 for the weights that count, found by sorting."""
    rows = S.t() if transposed else S
    flat = rows.reshape(-1, 4) if two_of_four else rows.reshape(1, -1)
    M = torch.zeros_like(flat).scatter(1, flat.argsort(dim=1, descending=True)[:, : flat.shape[1] // 2], 1.0)
    M = M.view(rows.shape)
    return M.t() if transposed else M


def test_zeros_of_a_pattern_come_step_by_step_and_never_outside_of_it() -> None:
    S = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    whole = lowest_of_layer(S, 0.5, (2, 4))
    for share in (0.1, 0.3):
        gone = lowest_scores(S, share, (2, 4), whole=False)
        assert int(gone.sum()) == round(share * S.numel()) and not bool((gone & ~whole).any())
        assert S[gone].max() <= S[whole & ~gone].min()
    assert torch.equal(lowest_scores(S, 0.5, (2, 4), whole=True), whole)


@pytest.mark.parametrize("fields", [{"sparsity": 0.7}, {"sparsity": 0.7, "ema": 0.8, "optimizer": "adamw8bit"}])
def test_a_training_ends_with_exactly_so_many_zeros_in_every_layer(
    tmp_path: Path, model: Path, fields: dict[str, Any]
) -> None:
    fields = fields | {"evaluate_every": 3, "weight_decay": 0.1}
    inputs = inputs_for(spec_of(MOVEMENT | fields), model, tmp_path / "room")
    prepared, task = begin(inputs)
    accelerator = accelerator_of(prepared.precision, prepared.device)
    story = train(task, accelerator, Checkpoints(inputs.work / "train", prepared.mark), Heard(), 999)
    for site in prepared.sites:
        weight = task.model.get_submodule(site.name).weight
        assert int((weight == 0).sum()) == round(0.7 * weight.numel())
    left = [(10 - done) / 8 for done in (3, 6, 9)]  # of 12 steps 2 come before the first zero, and 2 after the last
    rising = [0.0, *(0.7 * (1 - each**3) for each in left), 0.7]
    assert [one.sparsity for one in story.held_out] == pytest.approx(rising)
    sums, counts = task.held_out_losses(accelerator)
    kept = story.best(10)  # the first look with as many zeros
    assert kept is not None and float(sums.sum() / counts.sum()) == pytest.approx(kept.loss, rel=1e-12)
    assert kept.loss < 0.5 * story.held_out[0].loss


def test_scores_learn_at_their_own_rate_and_nothing_pulls_them_to_zero(tmp_path: Path, model: Path) -> None:
    step = MOVEMENT | {
        "learning_rate": 1e-3,
        "score_learning_rate": 0.5,
        "weight_decay": 0.5,
        "warmup": 0.0,
        "steps": 10,
    }
    inputs = inputs_for(spec_of(step), model, tmp_path / "room")
    prepared, task = begin(inputs)
    halted = dataclasses.replace(task, plan=dataclasses.replace(task.plan, steps=1))
    before = {name: one.detach().clone() for name, one in task.learning.items()}
    train(halted, accelerator_of("fp32", prepared.device), Checkpoints(inputs.work / "train", "mark"), Heard(), 999)
    for name, one in task.learning.items():
        if name.startswith("beside."):  # the first step of Adam is as long as the rate
            torch.testing.assert_close(one.detach().abs().median(), torch.tensor(0.5), rtol=1e-3, atol=0)
        elif name.endswith("norm.weight"):
            moved = one.detach() - before[name] * (1 - 1e-3 * 0.5)
            torch.testing.assert_close(moved.abs().median(), torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_zeros_that_were_there_stay_and_count(tmp_path: Path) -> None:
    source = pruned(FAMILIES["llama"](tmp_path / "model"))
    inputs = inputs_for(spec_of(MOVEMENT | {"sparsity": 0.6}), source, tmp_path / "room")
    prepared, task = begin(inputs)
    train(task, accelerator_of("fp32", prepared.device), Checkpoints(inputs.work / "train", "mark"), Heard(), 999)
    (file,) = source.glob("*.safetensors")
    for name, was in load_file(file).items():
        if name.endswith("_proj.weight"):
            now = task.learning[name].detach()
            assert bool((now[was == 0] == 0).all()) and int((now == 0).sum()) == round(0.6 * now.numel())


class Tearing(Heard):
    """Ends the attempt after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def advance(self, done: int, total: int, unit: str) -> None:
        super().advance(done, total, unit)
        if unit == "steps" and done == self._step:
            raise Torn


def test_a_training_that_was_torn_goes_on_to_the_same_bits(tmp_path: Path, model: Path) -> None:
    fields = {"pattern": "4:8", "evaluate_every": 5, "ema": 0.9, "optimizer": "adamw8bit"}
    spec = spec_of(MOVEMENT | fields)
    quiet, whole = go_on(inputs_for(spec, model, tmp_path / "quiet"))
    torn = dataclasses.replace(inputs_for(spec, model, tmp_path / "torn"), snapshot_seconds=0.0)
    with pytest.raises(Torn):
        go_on(torn, Tearing(7))
    again, story = go_on(torn)
    assert story.resumed == [6] and seen(story) == seen(whole) and story.held_out == whole.held_out
    assert all(torch.equal(one, quiet.learning[name]) for name, one in again.learning.items())


@pytest.mark.slow
def test_a_job_counts_the_zeros_of_what_it_wrote_and_says_first_what_they_save(tmp_path: Path, model: Path) -> None:
    spec = spec_of(MOVEMENT | {"pattern": "2:4"}, formats=["safetensors", "safetensors-zst"])
    inputs = inputs_for(spec, model, tmp_path)
    outcome = run(inputs, Heard())
    report, zeros, training = outcome.report, outcome.report.sparsity, outcome.report.training
    assert Report.model_validate_json((inputs.out / "report.json").read_text()) == report
    assert zeros is not None and training is not None
    assert (zeros.method, zeros.pattern, zeros.layers, zeros.reached) == ("movement", "2:4", 14, 0.5)
    assert zeros.rows_checked == sum(site.rows for n in range(2) for site in frame_of(model).sites(n))
    assert "are zero in the pattern 2:4" in report.warnings[0] and "smaller only for fewer bits" in report.warnings[0]
    assert training.loss_written == pytest.approx(training.loss_after, rel=1e-2)
    passed = {one.format for one in report.certificates if one.outcome == "passed"}
    assert passed == {"safetensors", "safetensors-zst"}
    sizes = {size.format: size.weight_bytes for size in report.sizes}
    assert sizes["safetensors-zst"] < 0.7 * sizes["safetensors"]
    assert outcome.result.sparsity == zeros.of_model


@pytest.mark.slow
def test_a_step_that_quantizes_keeps_the_zeros(tmp_path: Path, model: Path) -> None:
    steps = [MOVEMENT | QUICK | {"steps": 8}, {"kind": "quantize", "method": "gptq", "group_size": 32}]
    report = run(inputs_for(spec_of(steps=steps), model, tmp_path), Heard()).report
    assert report.sparsity is not None and report.sparsity.zeros_kept == 1.0 and report.sparsity.reached == 0.5
    assert all(layer.zeros_kept == 1.0 for block in report.blocks for layer in block.layers)
    assert "100.0% of the zeros of movement are zero in the result" in report.warnings[0]
    assert report.training is not None and report.training.loss_quantized


@pytest.mark.slow
def test_a_training_behind_it_keeps_and_counts_the_zeros(tmp_path: Path, model: Path) -> None:
    steps = [MOVEMENT | QUICK | {"steps": 8}, {"kind": "finetune", "method": "full", "steps": 3, "batch_size": 2}]
    report = run(inputs_for(spec_of(steps=steps), model, tmp_path), Heard()).report
    first = report.rounds[0].sparsity
    assert first is not None and first.reached == 0.5
    assert report.training is not None and report.training.zeros_kept == first.zeros


@pytest.mark.parametrize(
    ("family", "changes", "fields", "error", "words", "param"),
    [
        ("mixtral", {}, {}, ArchitectureUnsupported, "take sparsegpt, wanda or magnitude", "steps.0.method"),
        ("llama", {}, {"ignore": ["*"]}, ModelMalformed, "leaves no linear layer", "steps.0.ignore"),
        ("llama", {"intermediate_size": 252}, {"pattern": "4:8"}, SpecInvalid, "Take 2:4", "steps.0.pattern"),
    ],
)
def test_what_can_t_be_zeroed_so_is_refused_from_the_config_alone(
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    fields: dict[str, Any],
    error: type[Exception],
    words: str,
    param: str,
) -> None:
    source = FAMILIES[family](tmp_path / "model", **changes)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(error, match=words) as refused:
        check(spec_of(MOVEMENT | fields), tmp_path)
    assert getattr(refused.value, "param", None) == param


def test_too_few_steps_are_refused_where_epochs_come_to_them(tmp_path: Path, model: Path) -> None:
    rows = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    step = MOVEMENT | {"steps": None, "epochs": 1}
    with pytest.raises(SpecInvalid, match="train for more steps") as refused:
        run(inputs_for(spec_of(step), model, tmp_path, rows), Heard())
    assert refused.value.param == "steps.0.ramp_end"


def test_layers_that_are_ignored_stay_full(tmp_path: Path, model: Path) -> None:
    inputs = inputs_for(spec_of(MOVEMENT | {"ignore": ["*.down_proj"]}), model, tmp_path)
    prepared, task = begin(inputs)
    assert len(prepared.sites) == 12 and not any("down_proj" in site.name for site in prepared.sites)
    assert len(task.learning) == len(list(task.model.parameters())) + 12
    assert open_model(model).parameters == sum(one.numel() for one in task.model.parameters())


def test_the_weights_of_the_lowest_loss_are_kept_with_their_own_masks(tmp_path: Path, model: Path) -> None:
    hasty = {"learning_rate": 0.1, "score_learning_rate": 1.0, "schedule": "constant", "warmup": 0.0}
    fields = hasty | {"ramp_end": 0.3, "evaluate_every": 2, "patience": 2, "steps": 40}
    task, story = go_on(inputs_for(spec_of(MOVEMENT | fields), model, tmp_path))
    lowest = story.best(12)
    assert lowest is not None and story.stopped is not None and story.done == lowest.step + 4 >= 16
    sums, counts = task.held_out_losses(accelerator_of("fp32", task.device))
    assert float(sums.sum() / counts.sum()) == pytest.approx(lowest.loss, rel=1e-12)
    assert next(one.step for one in story.held_out if one.sparsity == 0.5) == 12
    zeros = sum(int((one == 0).sum()) for name, one in task.learning.items() if name.endswith("_proj.weight"))
    assert zeros == 294912 // 2
