"""Factors through the engine and the service's pipeline: ranked, multiplied out, loaded, told of, resumed."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.files.checkpoint import open_model
from models.formats import layout
from models.pipeline import check, run
from models.progress import Silent
from models.prune.factors.factoring import saved_by_factors
from models.prune.factors.frame import FactoredFrame
from models.weights.factored import Factored
from squeeze.errors import ModelMalformed, SpecInvalid
from squeeze.reports.report import Report
from squeeze.steps.factoring import SVD
from tests.models.engine_parts import frame_of, perplexity_in_transformers, thrown
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.prune.parts import spec_of, zeroing
from tests.models.prune.svd_killed import STEP
from tests.models.prune.svd_parts import factored
from tests.models.tiny import FAMILIES, KINDS

ROOT = Path(__file__).resolve().parents[3]


USUAL = ("gpt2", "mixtral")  # (in, out) weights; experts


@pytest.mark.parametrize(
    "family", [family if family in USUAL else pytest.param(family, marks=pytest.mark.slow) for family in KINDS]
)
def test_factors_of_every_kind_of_model_are_multiplied_out_into_a_plain_one(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family](tmp_path / "model")
    made, told = factored(model, tmp_path, SVD(method="svd", params_target=0.8))
    assert any(len(group.names) > 1 for group in told.groups) or family not in ("llama", "mixtral", "deepseek_v3")
    layout("safetensors").write(open_model(model), made, tmp_path / "out", Silent())
    before, after = open_model(model), open_model(tmp_path / "out")
    assert {n: (e.dtype, e.shape) for n, e in after.entries.items()} == {
        n: (e.dtype, e.shape) for n, e in before.entries.items()
    }
    frame = frame_of(model)
    for name, scheme in made.schemes.items():
        factors = made.codes(name)
        assert isinstance(factors, Factored) and factors.left.shape[1] == scheme.rank
        read = layout("safetensors").read(tmp_path / "out", name).dequantize(torch.float32)
        assert torch.equal(read, factors.dequantize(torch.float32))
        basis = made.codes(scheme.basis or "")
        assert isinstance(basis, Factored) and torch.equal(basis.right, factors.right)
    merged, split = (FactoredFrame(frame, made, merged=one) for one in (True, False))
    with merged.block(0) as whole, split.block(0) as thin, frame.surroundings(), torch.no_grad():
        hidden, calls = frame.enter(thrown().ids[:1])
        args, kwargs = calls[0]
        outputs = [block(hidden.clone(), *args, **kwargs) for block in (whole, thin)]
        one, other = (each[0] if isinstance(each, tuple) else each for each in outputs)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_job_ends_with_a_model_that_loads_and_a_report_that_says_what_factors_save(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=torch.bfloat16)
    inputs, heard = inputs_of(spec_of(STEP), model, None, tmp_path), Heard()
    outcome = run(inputs, heard)
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    told = report.factoring
    assert told is not None and report.warnings[0] == saved_by_factors(told, ("safetensors",)) in heard.messages
    assert "as many parameters and bytes as before" in report.warnings[0]
    assert report.bits_per_weight is None and outcome.result.compression_ratio is None
    assert told.parameters_before == open_model(model).parameters
    step = 8 * max(layer.rows + layer.columns for layer in told.layers)
    assert told.target * told.parameters_before - step < told.parameters_after <= told.target * told.parameters_before
    assert told.factor_bytes == open_model(model).weight_bytes - 2 * (told.parameters_before - told.parameters_after)
    assert told.linears == 14 and told.factored == sum(layer.rank is not None for layer in told.layers)
    assert all(layer.energy_kept is None or 0.3 < layer.energy_kept < 1 for layer in told.layers)
    assert told.speed_before.prompt > 0 and told.speed_factored.writing > 0 and told.lost is not None
    assert [one.outcome for one in report.certificates if one.consumer == "transformers"] == ["passed"]
    assert set(report.spent.work) == set(report.spent.seconds)
    quality = report.quality
    assert quality is not None and quality.perplexity_after == pytest.approx(
        perplexity_in_transformers(tmp_path / "out" / "safetensors", thrown()), rel=1.0
    )


def test_ignored_linears_keep_their_bits(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    step = SVD(method="svd", params_target=0.9, ignore=("*.1.*",), ranks="uniform", gradients=False)
    made, told = factored(model, tmp_path, step)
    layout("safetensors").write(open_model(model), made, tmp_path / "out", Silent())
    before, after = (load_file(directory / "model.safetensors") for directory in (model, tmp_path / "out"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name.removesuffix(".weight") for name in set(before) - same} == set(made.schemes)
    assert set(told.cuts) == {site.name for site in frame_of(model).sites(0)}


@pytest.mark.parametrize(
    ("step", "error", "words"),
    [
        ({"params_target": 0.1}, SpecInvalid, "the least that params_target can be is 0.386"),
        ({"params_target": 0.5, "ignore": ["*_proj"]}, ModelMalformed, "no linear layer"),
    ],
)
def test_what_can_t_be_factored_so_is_refused_from_the_config_alone(
    tmp_path: Path, step: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = FAMILIES["llama"](tmp_path / "whole")
    (tmp_path / "model").mkdir()
    shutil.copy(model / "config.json", tmp_path / "model")
    with pytest.raises(error, match=words) as refused:
        check(spec_of(zeroing("svd", **step)), tmp_path / "model")
    assert getattr(refused.value, "param", "").startswith("steps.0.")
    assert check(spec_of(STEP), tmp_path / "model").linears == 14


@pytest.mark.slow
def test_what_quantizes_after_it_goes_on_with_the_plain_model_and_is_compared_with_the_original(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    inputs = inputs_of(spec_of(STEP, {"kind": "quantize", "method": "gptq", "group_size": 32}), model, None, tmp_path)
    heard = Heard()
    report = run(inputs, heard).report
    assert report.factoring is not None and report.factoring.quality is not None and report.quality is not None
    assert report.quality.perplexity_before == report.factoring.quality.perplexity_before
    assert (report.quality.divergence_nats or 0) > (report.factoring.quality.divergence_nats or 0) > 0
    assert report.bits_per_weight == 4.5 and report.sizes[0].ratio and report.sizes[0].ratio > 2
    assert report.source.bytes == open_model(model).weight_bytes and "multiplied out again" in report.warnings[0]
    assert set(report.spent.work) == set(report.spent.seconds)
    assert set().union(*heard.expected) == set(report.spent.work)


@pytest.mark.slow
def test_a_job_killed_while_it_ranks_or_factors_ends_with_the_same_files(tmp_path: Path) -> None:
    model, heard = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=4), Heard()
    quiet = run(inputs_of(spec_of(STEP), model, None, tmp_path / "quiet"), Heard())
    room = tmp_path / "disturbed"
    for place in (("gradients", "6"), ("spectra", "2"), ("factors", "3")):
        command = [sys.executable, "-m", "tests.models.prune.svd_killed", str(model), str(room), *place]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    outcome = run(inputs_of(spec_of(STEP), model, None, room), heard)
    assert any(message.startswith("going on after block 2") for message in heard.messages)
    assert digests(room / "out") == digests(tmp_path / "quiet" / "out")
    assert outcome.report.quality == quiet.report.quality
