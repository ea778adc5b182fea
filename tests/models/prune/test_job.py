"""Zeros through the engine and the service's pipeline: written, read back, loaded by transformers, told of, resumed."""

import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.formats import layout
from models.measuring.evaluation import measure
from models.pipeline import check, run
from models.progress import Silent
from models.prune.zeroing.counting import counted_zeros, saved_by_zeros, zstd_bytes
from models.streaming import engine
from models.texts.data import calibration_batches, evaluation_windows
from models.texts.material import read_tokenizer
from squeeze.errors import CompressionBug, ModelAlreadyCompressed, ModelMalformed, SpecInvalid
from squeeze.reports.report import Report
from squeeze.steps.sparsifying import Magnitude, SparseGPT, Wanda
from tests.models.engine_parts import compressed, frame_of, perplexity_in_transformers, thrown
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.prune.killed import STEPS
from tests.models.prune.parts import spec_of, zeroing
from tests.models.tiny import FAMILIES, KINDS

ROOT = Path(__file__).resolve().parents[3]
BUNDLED = ROOT / "models" / "bundled"


@pytest.mark.parametrize("family", KINDS)
def test_the_model_that_is_written_is_the_one_that_was_measured(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family](tmp_path / "model")
    step = Wanda(method="wanda", pattern="2:4")
    done, quality = compressed(model, tmp_path / "work", step, windows := thrown())
    layout("safetensors").write(open_model(model), done.model, tmp_path / "out", Silent())
    assert perplexity_in_transformers(tmp_path / "out", windows) == pytest.approx(quality.perplexity_after, rel=1e-4)
    counted = counted_zeros(open_model(model), tmp_path / "out", done.model.sites.values(), step)
    assert counted.reached == pytest.approx(0.5, abs=1e-4) and counted.layers == len(done.model.sites)
    assert counted.rows_checked == sum(site.rows for site in done.model.sites.values())
    before, after = open_model(model), open_model(tmp_path / "out")
    assert {name: entry.dtype for name, entry in after.entries.items()}.keys() == before.entries.keys()
    assert all(layer.sparsity == 0.5 for block in done.blocks for layer in block.layers)


def test_wanda_judges_a_block_s_linears_by_what_they_read_before_any_of_it_was_pruned(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    done, _ = compressed(model, tmp_path / "work", Wanda(method="wanda", sparsity=0.75), windows := thrown())
    whole, read = AutoModelForCausalLM.from_pretrained(model), []
    down = whole.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, given: read.append(given[0].detach().flatten(0, 1)))
    whole(windows.ids)
    scores = down.weight.detach().abs() * read[0].norm(dim=0)
    expected = scores < scores.sort(dim=1).values[:, 192:193]  # of 256 inputs
    result = done.model.codes("model.layers.0.mlp.down_proj").dequantize(torch.float32)
    assert ((result == 0) == expected).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_their_type_and_those_that_stay_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=dtype)
    done, _ = compressed(model, tmp_path / "work", step := Magnitude(method="magnitude", ignore=("*.1.*",)))
    layout("safetensors").write(open_model(model), done.model, tmp_path / "out", Silent())
    before, after = (load_file(directory / "model.safetensors") for directory in (model, tmp_path / "out"))
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        pruned = name.removesuffix(".weight") in done.model.sites
        assert torch.equal(tensor, torch.where(tensor == 0, 0, before[name]) if pruned else before[name])
    assert step.scheme().element == "dense" and len(done.model.sites) == 7
    read = layout("safetensors").read(tmp_path / "out", name := next(iter(done.model.sites)))
    assert torch.equal(read.dequantize(dtype), done.model.codes(name).dequantize(dtype))


def test_a_row_that_breaks_the_pattern_is_found_in_what_was_written(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    source, step = open_model(model), Magnitude(method="magnitude", pattern="4:8")
    sites = frame_of(model).sites(0)
    with pytest.raises(CompressionBug, match="breaks the pattern 4:8"):
        counted_zeros(source, model, sites, step)


def test_what_is_real_is_measured_with_zstd(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=torch.bfloat16)
    done, _ = compressed(model, tmp_path / "work", step := Magnitude(method="magnitude", sparsity=0.9))
    layout("safetensors").write(open_model(model), done.model, tmp_path / "out", Silent())
    counted = counted_zeros(open_model(model), tmp_path / "out", done.model.sites.values(), step)
    assert counted.weight_bytes == open_model(model).weight_bytes
    assert counted.zstd_bytes < 0.6 * counted.zstd_bytes_before < counted.weight_bytes
    assert zstd_bytes(open_model(model), Fraction(1, 4)) == pytest.approx(counted.zstd_bytes_before, rel=0.1)
    assert "as large as before" in (told := saved_by_zeros(counted)) and f"{counted.zstd_bytes:,}" in told


@pytest.mark.parametrize(
    ("fields", "step", "words"),
    [
        ({"intermediate_size": 258}, {"pattern": "2:4"}, "has 258, not 256 or 260. Take `sparsity` 0.5"),
        ({"intermediate_size": 260}, {"pattern": "4:8"}, "Take 2:4, which fits all layers"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused_from_the_config_alone(
    tmp_path: Path, fields: dict[str, Any], step: dict[str, Any], words: str
) -> None:
    model = FAMILIES["llama"](tmp_path / "whole", **fields)
    (tmp_path / "model").mkdir()
    shutil.copy(model / "config.json", tmp_path / "model")
    with pytest.raises(SpecInvalid, match=words) as refused:
        check(spec_of(zeroing(**step)), tmp_path / "model")
    assert refused.value.param == "steps.0.pattern"
    assert check(spec_of(zeroing(ignore=["*down_proj"], **step)), tmp_path / "model").linears == 12
    with pytest.raises(ModelMalformed, match="no linear layer"):
        check(spec_of(zeroing(ignore=["*"])), tmp_path / "model")


def test_a_model_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}')
    with pytest.raises(ModelAlreadyCompressed):
        check(spec_of(zeroing()), tmp_path)


def test_a_job_ends_with_a_model_that_loads_and_a_report_that_says_what_zeros_save(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    inputs, heard = inputs_of(spec_of(zeroing()), model, None, tmp_path), Heard()
    outcome = run(inputs, heard)
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert report.sparsity is not None and report.warnings[0] == saved_by_zeros(report.sparsity)
    assert report.warnings[0] in heard.messages
    assert report.bits_per_weight is None and outcome.result.compression_ratio is None
    assert outcome.result.sparsity == report.sparsity.of_model > 0.3
    assert [one.outcome for one in report.certificates if one.consumer == "transformers"] == ["passed"]
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "safetensors").model.layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean() == 0.5
    assert set(report.spent.work) == set(report.spent.seconds)


@pytest.mark.slow
def test_what_quantizes_after_it_leaves_the_zeros_and_is_measured_against_the_original(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    spec = spec_of(zeroing("wanda", pattern="2:4"), {"kind": "quantize", "method": "gptq", "group_size": 32})
    inputs, heard = inputs_of(spec, model, None, tmp_path), Heard()
    outcome = run(inputs, heard)
    report = outcome.report
    assert report.sparsity is not None and report.sparsity.quality is not None and report.quality is not None
    assert report.sparsity.zeros_kept == 1.0 and report.sparsity.rows_checked
    assert report.bits_per_weight == 4.5 and report.sizes[0].ratio and report.sizes[0].ratio > 2
    assert report.quality.perplexity_before == report.sparsity.quality.perplexity_before
    assert (report.quality.divergence_nats or 0) > (report.sparsity.quality.divergence_nats or 0) > 0
    assert report.source.bytes == open_model(model).weight_bytes and "are zero in the result" in report.warnings[0]
    assert set(report.spent.work) == set(report.spent.seconds)
    assert [set(one) for one in heard.expected] == [set(report.spent.work)] * 2


@pytest.mark.slow
def test_a_job_killed_in_either_step_ends_with_the_same_files(tmp_path: Path) -> None:
    model, heard = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=4), Heard()
    quiet = run(inputs_of(spec_of(*STEPS), model, None, tmp_path / "quiet"), Heard())
    room = tmp_path / "disturbed"
    for place in (("prune", "2"), ("prune", "4"), ("quantize", "3")):
        command = [sys.executable, "-m", "tests.models.prune.killed", str(model), str(room), *place]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    outcome = run(inputs_of(spec_of(*STEPS), model, None, room), heard)
    going = [message for message in heard.messages if message.startswith("going on after block")]
    assert [message.split()[4] for message in going] == ["4", "2"]
    assert digests(room / "out") == digests(tmp_path / "quiet" / "out")
    assert outcome.report.sparsity == quiet.report.sparsity and outcome.report.quality == quiet.report.quality


@pytest.mark.slow
@pytest.mark.parametrize("target", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_the_order_of_the_papers_holds_on_a_trained_model(tmp_path: Path, target: dict[str, Any]) -> None:
    tokenizer = read_tokenizer(BUNDLED)
    ids = calibration_batches(tokenizer, None, None, 64, 512, 0).ids
    windows = evaluation_windows(tokenizer, None, None, True, 16, 512, None)
    divergences = []
    for kind in (Magnitude, Wanda, SparseGPT):
        step, frame = kind.model_validate({"method": kind.__name__.lower()} | target), frame_of(BUNDLED)
        given = ids if step.needs_calibration else None
        done = engine.quantize(frame, step, given, windows, tmp_path / step.method, "", Silent())
        streams = done.activations.original, done.activations.compressed
        divergences.append(measure(frame, windows, *streams, Silent()).quality.divergence_nats or 0.0)
    magnitude, wanda, sparsegpt = divergences
    assert magnitude > wanda > 1.2 * sparsegpt, divergences
