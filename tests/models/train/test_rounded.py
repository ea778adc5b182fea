"""Quantization-aware training of tiny models: what is learned, what an interrupted one goes on to, what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from models.measuring.evaluation import measure
from models.pipeline import check, run
from models.progress import Silent
from models.train.rounded import learned_codes, passed_again
from models.weights.codes import Codes
from squeeze.errors import DataUnusable
from squeeze.reports.training import Tuning
from tests.models.job_parts import Heard, inputs_of
from tests.models.job_parts import spec_of as any_spec_of
from tests.models.tiny import FAMILIES
from tests.models.train.killed_rounded import begun_of, spec_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


def falls(tuning: Tuning) -> bool:
    """In the last third of the steps it is lower than in the first."""
    losses, part = [one.loss for one in tuning.curve], len(tuning.curve) // 3
    return sum(losses[-part:]) < 0.9 * sum(losses[:part])


@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("llama", {"train": "scales"}),
        ("gpt2", {"train": "scales", "symmetric": False, "start": "rtn"}),
        ("llama", {"train": "scales", "start": "autoround"}),
        ("mixtral", {"train": "weights", "distill": False}),
    ],
)
def test_what_it_learns_is_what_is_measured(tmp_path: Path, family: str, step: dict[str, Any]) -> None:
    begun = begun_of(spec_of(step | {"steps": 15}), FAMILIES[family](tmp_path / "model"), tmp_path)
    before = {name: begun.done.model.codes(name).tensors() for name in begun.done.model.sites}
    model, tuning = learned_codes(begun, Silent())
    done = passed_again(begun, model, Silent())
    assert falls(tuning)
    assert list(done.model.sites) == list(before) and len(done.blocks) == 2
    stays = step["train"] == "scales"
    for name, was in before.items():
        learned, stored = model.codes(name), cast(Codes, done.model.codes(name))
        assert all(torch.equal(tensor, stored.tensors()[part]) for part, tensor in learned.tensors().items())
        assert torch.equal(stored.zero, was["zero"])
        assert not torch.equal(stored.scale, was["scale"])
        assert torch.equal(stored.codes, was["codes"]) or not stays
    if not stays:
        assert any(not torch.equal(cast(Codes, model.codes(name)).codes, was["codes"]) for name, was in before.items())
    frames, windows = begun.frames, begun.windows
    assert windows is not None
    streams = done.activations.original, done.activations.compressed
    quality = measure(frames.result, windows, *streams, Silent(), reference=frames.reference).quality
    assert quality.divergence_nats != tuning.divergence_start
    layer = done.blocks[0].layers[0]
    assert layer.damping == begun.done.blocks[0].layers[0].damping and layer.bits == 2


def test_one_that_was_killed_goes_on_to_the_same_codes(tmp_path: Path, model: Path) -> None:
    quiet = learned_codes(begun_of(spec_of(), model, tmp_path / "quiet"), Silent())
    command = [sys.executable, "-m", "tests.models.train.killed_rounded", str(model), str(tmp_path / "killed"), "4"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    heard = Heard()
    resumed = learned_codes(begun_of(spec_of(), model, tmp_path / "killed", heard), heard)
    assert any("going on after block 2 of 2" in message for message in heard.messages)
    assert resumed[1].resumed == [3]
    assert [one.loss for one in resumed[1].curve] == [one.loss for one in quiet[1].curve]
    for name in quiet[0].sites:
        parts = quiet[0].codes(name).tensors(), resumed[0].codes(name).tensors()
        assert all(torch.equal(parts[0][part], parts[1][part]) for part in parts[0])


def test_micro_batches_and_checkpointed_activations_change_nothing_but_rounding(tmp_path: Path, model: Path) -> None:
    ways: list[dict[str, Any]] = [{}, {"micro_batch_size": 1, "activation_checkpointing": True}, {"precision": "bf16"}]
    curves = []
    for number, way in enumerate(ways):
        spec = spec_of({"train": "weights", "steps": 3} | way)
        tuning = learned_codes(begun_of(spec, model, tmp_path / str(number)), Silent())[1]
        curves.append([one.loss for one in tuning.curve])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[2] == pytest.approx(curves[0], rel=0.1)


def test_a_model_that_does_not_fit_is_refused_from_its_config_with_figures(tmp_path: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 1 << 17, "intermediate_size": 1 << 19, "num_hidden_layers": 4, "head_dim": 1 << 15}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for train, words in (("weights", "train: scales"), ("scales", "distill: false")):
        with pytest.raises(DataUnusable, match=rf"needs about [\d.]+ GiB, and [\d.]+ GiB are free.*{words}"):
            check(spec_of({"train": train}), tmp_path)
    assert check(any_spec_of(), tmp_path).linears == 28


@pytest.mark.slow
def test_the_result_loads_where_gptq_s_does_with_the_figures_of_the_report(tmp_path: Path, model: Path) -> None:
    heard = Heard()
    outcome = run(inputs_of(spec_of({"train": "weights"}), model, None, tmp_path), heard)
    report = outcome.report
    assert set(outcome.directories) == {"compressed-tensors", "gptq"}
    assert {one.format for one in report.certificates if one.outcome == "passed"} == set(outcome.directories)
    assert report.tuning is not None and report.tuning.steps == len(report.tuning.curve) == 8
    assert report.quality is not None and report.quality.divergence_nats is not None
    assert report.tuning.divergence_start is not None
    assert {"compressing", "training"} <= set(report.spent.seconds) and "training" in report.spent.work
