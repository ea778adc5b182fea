"""Whole jobs that train: the adapter and the merged model certified, and 4-bit weights of what was learned."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.files.checkpoint import open_model
from models.formats import layout
from models.pipeline import check, run
from models.streaming.frame import Frame
from models.weights.quantized import Site
from squeeze.errors import ModelMalformed
from squeeze.objects import Stage
from squeeze.reports.report import Report
from tests.models.engine_parts import frame_of
from tests.models.job_parts import Heard, digests
from tests.models.tiny import FAMILIES
from tests.models.train.parts import inputs_for, spec_of, written


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


@pytest.mark.slow
def test_a_training_ends_with_an_adapter_and_a_merged_model_that_lose_what_the_report_says(
    tmp_path: Path, model: Path
) -> None:
    inputs, heard = inputs_for(spec_of({"merge": True}), model, tmp_path), Heard()
    outcome = run(inputs, heard)
    report, training = outcome.report, outcome.report.training
    assert Report.model_validate_json((inputs.out / "report.json").read_text()) == report
    assert sorted(path.name for path in inputs.out.iterdir()) == ["peft", "report.json", "safetensors"]
    assert heard.stages == [Stage.planning, Stage.loading, Stage.training, Stage.exporting, Stage.certifying]
    assert training is not None and training.steps == training.best_step == len(training.curve) == 12
    assert training.loss_after < 0.9 * training.loss_before
    assert training.loss_written == pytest.approx(training.loss_after, rel=1e-2)  # rounded to bfloat16
    assert training.trainable_parameters == 4 * sum(site.rows + site.columns for site in sites(model))
    assert training.data.records + training.data.held_out_records == 60 and training.packed
    passed = {one.consumer: one for one in report.certificates if one.outcome == "passed"}
    assert set(passed) == {"peft", "transformers"}
    for one in passed.values():
        assert one.perplexity == pytest.approx(one.expected_perplexity, rel=1e-3) and one.sample is not None
    assert (outcome.result.loss_before, outcome.result.loss_after) == (training.loss_before, training.loss_after)
    assert outcome.result.bits_per_weight is outcome.result.compression_ratio is None
    merged = open_model(outcome.directories["safetensors"])
    assert str(merged.dtype) == "torch.bfloat16" and merged.names() == open_model(model).names()
    config = json.loads((outcome.directories["peft"] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/model"
    for name, words in (("peft", "PeftModel"), ("safetensors", 'base_model_relation: "finetune"')):
        assert words in (outcome.directories[name] / "README.md").read_text()

    before = digests(inputs.out)
    assert run(inputs, Heard()).report.training.resumed == [12]  # all that is left is to write it again
    assert digests(inputs.out) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [{"method": "ia3", "merge": True}, {"method": "prompt"}, {"method": "prefix"}],
    ids=lambda step: step["method"],
)
def test_every_kind_of_adapter_is_certified(tmp_path: Path, model: Path, step: dict[str, Any]) -> None:
    outcome = run(inputs_for(spec_of(step | {"learning_rate": 0.03}), model, tmp_path), Heard())
    training = outcome.report.training
    assert training is not None and training.loss_after < 0.97 * training.loss_before
    assert training.packed == ("merge" in step) == (training.loss_written is not None)
    passed = [one.consumer for one in outcome.report.certificates if one.outcome == "passed"]
    assert passed == (["peft", "transformers"] if "merge" in step else ["peft"])


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_what_was_learned_beside_rounded_weights_is_merged_into_those_that_came(
    tmp_path: Path, model: Path, base: str
) -> None:
    step = {"method": "qlora", "base": base, "rank": 4, "merge": True}
    outcome = run(inputs_for(spec_of(step), model, tmp_path), Heard())
    training = outcome.report.training
    assert training is not None and training.loss_after < 0.9 * training.loss_before
    assert training.loss_written is not None
    assert training.loss_written == pytest.approx(training.loss_after, rel=0.05)
    certificates = {one.consumer: one for one in outcome.report.certificates}
    assert certificates["peft"].outcome == certificates["transformers"].outcome == "passed"
    assert "rounded by bitsandbytes as it was then" in certificates["peft"].detail
    card = (outcome.directories["peft"] / "README.md").read_text()
    assert f"BitsAndBytesConfig(load_in_{4 if base == 'nf4' else 8}bit=True" in card


@pytest.mark.slow
def test_an_adapter_and_the_weights_that_gptq_rounded_for_it_are_certified_together(
    tmp_path: Path, model: Path
) -> None:
    step = {"method": "qlora", "base": "gptq", "rank": 4, "merge": True}
    inputs, heard = inputs_for(spec_of(step), model, tmp_path), Heard()
    outcome = run(inputs, heard)
    report, training = outcome.report, outcome.report.training
    assert set(outcome.directories) == {"peft", "gptq", "safetensors"}
    assert heard.stages == [
        Stage.planning,
        Stage.loading,
        Stage.calibrating,
        Stage.compressing,
        Stage.evaluating,
        Stage.training,
        Stage.exporting,
        Stage.certifying,
    ]
    assert training is not None and training.loss_after < 0.9 * training.loss_before
    assert training.loss_written == pytest.approx(training.loss_after, rel=0.05)
    passed = {(one.format, one.consumer): one for one in report.certificates if one.outcome == "passed"}
    assert set(passed) == {("peft", "peft"), ("gptq", "transformers"), ("safetensors", "transformers")}
    assert "as gptq holds it" in passed["peft", "peft"].detail
    beside, base = (passed[key].expected_perplexity for key in (("peft", "peft"), ("gptq", "transformers")))
    assert beside is not None and base is not None and beside < 0.9 * base
    assert report.bits_per_weight == 4.125 and report.quality is not None and report.calibration is not None
    assert len(report.blocks) == 2 and {"compressing", "evaluating"} < set(report.spent.seconds)
    assert outcome.result.compression_ratio is not None and outcome.result.compression_ratio > 1
    codes = layout("gptq").read(outcome.directories["gptq"], "model.layers.0.mlp.up_proj")
    assert (codes.scheme.bits, codes.scheme.group_size) == (4, 128)
    assert "the `gptq` result of the same job" in (outcome.directories["peft"] / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw8bit", "galore", "badam"])
def test_all_weights_learn_in_little_memory(tmp_path: Path, model: Path, optimizer: str) -> None:
    step = {"method": "full", "optimizer": optimizer, "projection_rank": 8, "block_steps": 2, "ema": 0.5}
    outcome = run(inputs_for(spec_of(step | {"learning_rate": 0.003}), model, tmp_path), Heard())
    training = outcome.report.training
    assert training is not None and training.loss_after < 0.97 * training.loss_before
    assert training.loss_after == training.held_out[-1].loss
    assert training.loss_written == pytest.approx(training.loss_after, rel=1e-2)
    assert training.trainable_parameters == open_model(model).parameters
    assert outcome.report.certificates[0].outcome == "passed"


@pytest.mark.slow
def test_what_was_learned_is_quantized_in_the_same_job(tmp_path: Path, model: Path) -> None:
    learn = {"kind": "finetune", "method": "lora", "merge": True, "steps": 12, "learning_rate": 0.01, "rank": 4}
    steps = [learn, {"kind": "quantize", "method": "gptq", "group_size": 32}]
    outcome = run(inputs_for(spec_of(steps=steps), model, tmp_path), Heard())
    report, training, quality = outcome.report, outcome.report.training, outcome.report.quality
    assert set(outcome.directories) == {"compressed-tensors"} and report.bits_per_weight == 4.5
    assert training is not None and training.loss_after < training.loss_before
    assert quality is not None and quality.divergence_nats is not None and quality.divergence_nats < 0.2
    assert quality.text.origin == training.data.held_out_origin and not quality.text.generic
    assert (report.source.dtype, report.source.bytes) == ("float32", open_model(model).weight_bytes)
    assert [step["method"] for step in report.recipe] == ["lora", "gptq"]
    assert report.certificates[0].outcome == "passed"
    assert training.loss_written is not None
    assert training.loss_quantized["compressed-tensors"] == pytest.approx(training.loss_written, rel=0.1)
    assert training.loss_quantized["compressed-tensors"] != training.loss_written < training.loss_before


@pytest.mark.parametrize(
    ("step", "error", "words", "param"),
    [({"target_modules": ["*.wq"]}, ModelMalformed, "matches no linear layer", "steps.0.target_modules")],
)
def test_what_can_t_be_trained_is_refused_from_the_config_alone(
    tmp_path: Path, model: Path, step: dict[str, Any], error: type[Exception], words: str, param: str
) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(error, match=words) as refused:
        check(spec_of(step), tmp_path)
    assert getattr(refused.value, "param", None) == param
    assert check(spec_of(), tmp_path).linears == 14


@pytest.mark.slow
def test_a_training_that_learns_nothing_for_others_says_so(tmp_path: Path, model: Path) -> None:
    heard, other = Heard(), [{"text": f"quartz jumps {n} zephyrs by vex"} for n in range(9)]
    inputs = inputs_for(spec_of(evaluation={"source": "file-zyxwvuts"}), model, tmp_path)
    inputs = dataclasses.replace(inputs, evaluation_text=written(tmp_path / "other", other))
    outcome = run(inputs, heard)
    assert any("held-out loss rose" in one for one in outcome.report.warnings)
    assert set(outcome.report.warnings) <= set(heard.messages)


def sites(model: Path) -> list[Site]:
    frame: Frame = frame_of(model)
    return [site for n in range(frame.count) for site in frame.sites(n)]


@pytest.mark.slow
def test_a_model_that_has_learned_can_be_given_back(tmp_path: Path, model: Path) -> None:
    program = (
        "import gc, sys, weakref; from pathlib import Path\n"
        "from tests.models.train.parts import begin, inputs_for, spec_of\n"
        "_, task = begin(inputs_for(spec_of(), Path(sys.argv[1]), Path(sys.argv[2])))\n"
        "weight = weakref.ref(next(task.model.parameters())); del task; gc.collect()\n"
        "assert weight() is None, 'something keeps the model'"
    )  # in a process that has imported nothing yet
    subprocess.run([sys.executable, "-c", program, str(model), str(tmp_path)], check=True)
