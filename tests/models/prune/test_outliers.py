"""Zeros by outliers: whose blocks get how many, that all together are as many as asked for, and that it resumes."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from models.pipeline import run
from models.progress import Silent
from models.prune.zeroing.masks import lowest_of_rows
from models.prune.zeroing.outliers import shares_of, spread
from models.streaming import engine
from squeeze.steps.sparsifying import Magnitude, SparseGPT, Uneven, Wanda
from tests.models.engine_parts import frame_of, thrown
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.prune.killed import UNEVEN
from tests.models.prune.parts import spec_of, zeroing
from tests.models.tiny import FAMILIES

ROOT = Path(__file__).resolve().parents[3]
OWL: dict[str, Any] = {"distribution": "owl", "outlier_multiple": 3.0}


def louder(model: Path) -> Path:
    """With outliers in the second block."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        whole.model.layers[1].mlp.up_proj.weight[:, ::16] *= 8
    whole.save_pretrained(model)
    return model


def test_outliers_are_counted_in_each_block_of_the_model_as_it_is(tmp_path: Path) -> None:
    model, windows = louder(FAMILIES["llama"](tmp_path / "model")), thrown()
    frame, step = frame_of(model), Wanda(method="wanda", sparsity=0.6, **OWL)
    schemes = engine.schemes_of(frame, step)
    found, told = spread(frame, step, schemes, windows.ids, tmp_path / "work", "", Silent(), 30.0)
    whole, scores = AutoModelForCausalLM.from_pretrained(model), {}
    for name in schemes:
        linear = whole.get_submodule(name)

        def judge(one: Any, given: Any, name: str = name) -> None:
            norms = given[0].detach().flatten(0, 1).double().square().mean(dim=0).sqrt()
            scores[name] = one.weight.detach().double().abs() * norms

        linear.register_forward_pre_hook(judge)
    whole(windows.ids)
    for index, one in enumerate(told):
        block = torch.cat([each.flatten() for name, each in scores.items() if f".layers.{index}." in name])
        assert one.outliers == pytest.approx(float((block > 3 * block.mean()).double().mean()), abs=1e-4)
    assert told[0].outliers < told[1].outliers and told[0].sparsity == pytest.approx(told[1].sparsity + 0.16)
    assert {round(scheme.sparsity, 3) for scheme in found.values()} == {round(one.sparsity, 3) for one in told}


def test_the_mean_over_weights_is_the_target_and_the_spread_is_kept() -> None:
    step = Wanda(method="wanda", sparsity=0.7, distribution="owl", outlier_spread=0.1)
    shares = shares_of([0.01, 0.04, 0.02], [100, 300, 50], step)
    assert sum(one * count for one, count in zip(shares, [100, 300, 50], strict=True)) / 450 == pytest.approx(0.7)
    assert shares[0] - shares[1] == pytest.approx(0.2) and shares[0] > shares[2] > shares[1]
    assert shares_of([0.02, 0.02], [10, 10], step) == [0.7, 0.7]
    assert shares_of([0.01, 0.0, 0.03], [10, 0, 10], step)[::2] == pytest.approx([0.8, 0.6])


@pytest.mark.parametrize("share", [0.3, 0.5, 1 / 3])
def test_rows_share_what_a_layer_loses_where_it_does_not_divide(share: float) -> None:
    scores = torch.rand(31, 50, generator=torch.Generator().manual_seed(0))
    mask = lowest_of_rows(scores, share, None)
    assert int(mask.sum()) == round(share * scores.numel())
    assert int(mask.sum(dim=1).max() - mask.sum(dim=1).min()) <= 1
    assert all(row[gone].max() < row[~gone].min() for row, gone in zip(scores, mask, strict=True))


@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_all_together_have_exactly_as_many_zeros_as_asked_for(tmp_path: Path, method: type[Uneven]) -> None:
    model, windows = louder(FAMILIES["llama"](tmp_path / "model")), thrown()
    step = method.model_validate({"method": method.__name__.lower(), "sparsity": 0.613} | OWL)
    frame = frame_of(model)
    asked = frame, step, engine.schemes_of(frame, step), windows.ids, tmp_path / "look", "", Silent(), 30.0
    schemes, told = spread(*asked)
    done = engine.quantize(frame, step, windows.ids, windows, tmp_path / "work", "", Silent(), schemes=schemes)
    results = [done.model.codes(name).dequantize(torch.float32) for name in done.model.sites]
    assert sum(int((one == 0).sum()) for one in results) == round(0.613 * sum(one.numel() for one in results))
    for block, one in zip(done.blocks, told, strict=True):
        assert all(layer.sparsity == pytest.approx(one.sparsity, abs=1e-3) for layer in block.layers)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"distribution": "owl", "pattern": "2:4"}, "same share of zeros everywhere"),
        ({"distribution": "owl", "sparsity": 0.9}, "take less than 0.05"),
        ({"outlier_spread": 0.1}, "go with distribution `owl`"),
    ],
)
def test_what_can_t_be_uneven_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Wanda(method="wanda", **fields)
    assert "distribution" not in Magnitude.model_fields, "it looks at no text"


@pytest.mark.slow
def test_a_job_killed_while_it_looks_ends_with_the_same_files_and_tells_of_each_block(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=4)
    quiet = run(inputs_of(spec_of(UNEVEN), model, None, tmp_path / "quiet"), Heard())
    room, heard = tmp_path / "disturbed", Heard()
    command = [sys.executable, "-m", "tests.models.prune.killed", str(model), str(room), "look", "3"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    outcome = run(inputs_of(spec_of(UNEVEN), model, None, room), heard)
    assert any(message.startswith("going on after block 2 of 4") for message in heard.messages)
    assert digests(room / "out") == digests(tmp_path / "quiet" / "out")
    sparsity = outcome.report.sparsity
    assert sparsity is not None and sparsity == quiet.report.sparsity
    assert sparsity.reached == pytest.approx(0.6, abs=1e-5) and len(sparsity.distribution or ()) == 4
    assert "allotting" in outcome.report.spent.work and set(outcome.report.spent.work) == set(
        outcome.report.spent.seconds
    )


@pytest.mark.slow
def test_zeros_that_stand_unevenly_are_kept_by_what_quantizes_after(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    spec = spec_of(zeroing("sparsegpt", distribution="owl"), {"kind": "quantize", "method": "gptq", "group_size": 32})
    report = run(inputs_of(spec, model, None, tmp_path), Heard()).report
    assert report.sparsity is not None and report.sparsity.zeros_kept == 1.0 and report.sparsity.distribution
