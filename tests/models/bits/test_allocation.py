"""Bits that are allotted layer by layer: predicted losses against measured ones, budgets kept, targets refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from models.bits.allocation import allot, mixed
from models.formats import layout
from models.formats.directory import weight_bytes
from models.formats.fitness import stored_alike
from models.measuring.evaluation import measure
from models.pipeline import check, run
from models.progress import Silent
from models.streaming import engine
from models.streaming.frame import Frame
from squeeze.errors import FormatUnfit, SpecInvalid
from squeeze.names import Format
from squeeze.reports.report import Allocation
from squeeze.specs.formats import candidates, refuse_unfit
from squeeze.steps.quantization import GPTQ, RTN, Grouped
from squeeze.steps.schemes import Scheme
from tests.models.engine_parts import frame_of, thrown
from tests.models.job_parts import inputs_of, spec_of
from tests.models.tiny import FAMILIES, VOCABULARY

IDS = torch.randint(0, VOCABULARY, (24, 64), generator=torch.Generator().manual_seed(5))
CT: tuple[Format, ...] = ("compressed-tensors",)


def step_of(method: str = "rtn", **fields: Any) -> Grouped:
    kind = GPTQ if method == "gptq" else RTN
    return kind.model_validate({"method": method, "group_size": 32, "bits": "auto"} | fields)


def allotted(
    frame: Frame, step: Grouped, directory: Path, notify: Silent | None = None
) -> tuple[dict[str, Scheme], Allocation]:
    return allot(frame, step, CT, IDS, directory, "", notify or Silent())


def divergence(frame: Frame, step: Grouped, schemes: dict[str, Scheme], work: Path) -> float:
    windows = thrown(8)
    ids = IDS if step.reads_inputs else None
    done = engine.quantize(frame, step, ids, windows, work, "", Silent(), schemes=schemes)
    measured = measure(frame, windows, done.activations.original, done.activations.compressed, Silent())
    assert measured.quality.divergence_nats is not None
    return measured.quality.divergence_nats


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> Frame:
    return frame_of(FAMILIES["llama"](tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, frame: Frame) -> Path:
    """The directory of a measurement with round-to-nearest."""
    directory = tmp_path_factory.mktemp("measured") / "sensitivity"
    allotted(frame, step_of(target_bits=4), directory)
    return directory


@pytest.mark.parametrize("bits", [4, 8])
def test_the_predicted_divergence_is_the_measured_one(frame: Frame, measured: Path, tmp_path: Path, bits: int) -> None:
    """One linear at a time, so that nothing adds up or cancels."""
    _, table = allotted(frame, step_of(target_bits=4), measured)
    for layer in table.layers[:7]:
        predicted = next(trial.divergence_nats for trial in layer.trials if trial.bits == bits)
        scheme = Scheme("int", bits, 32)
        found = divergence(frame, step_of(target_bits=4), {layer.name: scheme}, tmp_path / layer.name)
        assert predicted / 1.6 < found < predicted * 1.6


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_budget_is_kept_and_what_engines_fuse_is_stored_alike(tmp_path: Path, family: str) -> None:
    frame = frame_of(FAMILIES[family](tmp_path / "model"))
    schemes, table = allotted(frame, step_of(target_bits=3.2), tmp_path / "work")
    weights = {layer.name: layer.weights for layer in table.layers}
    average = sum(weights[name] * scheme.bits for name, scheme in schemes.items()) / sum(weights.values())
    assert average == pytest.approx(table.bits)
    assert 3.0 < average <= 3.2
    assert all(len({schemes[name].bits for name in group}) == 1 for group in stored_alike(schemes))
    assert {layer.name: layer.bits for layer in table.layers} == {name: one.bits for name, one in schemes.items()}
    losses = [optimum.divergence_nats for optimum in table.curve]
    assert losses == sorted(losses, reverse=True)


def test_an_allotted_model_diverges_less_than_a_uniform_one_of_its_size(
    frame: Frame, measured: Path, tmp_path: Path
) -> None:
    step = step_of(target_bits=3)
    schemes, table = allotted(frame, step, measured)
    uniform = {name: Scheme("int", 3, 32) for name in schemes}
    assert len({scheme.bits for scheme in schemes.values()}) > 1
    assert table.bits <= 3
    assert divergence(frame, step, schemes, tmp_path / "own") < divergence(frame, step, uniform, tmp_path / "uniform")


def test_a_result_has_no_more_bytes_than_its_target(frame: Frame, measured: Path, tmp_path: Path) -> None:
    step = step_of(target_bytes=frame.source.weight_bytes * 45 // 100)
    schemes, _ = allotted(frame, step, measured)
    done = engine.quantize(frame, step, None, None, tmp_path / "work", "", Silent(), schemes=schemes)
    layout("compressed-tensors").write(frame.source, done.model, tmp_path / "out", Silent())
    assert step.target_bytes is not None
    assert 0.95 * step.target_bytes < weight_bytes(tmp_path / "out") <= step.target_bytes


def test_a_target_that_no_choice_meets_is_refused_with_figures(frame: Frame, tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match="bytes are not quantized, and 2 bits for all layers take") as refused:
        allotted(frame, step_of(target_bytes=1000), tmp_path / "work")
    assert refused.value.param == "target_bytes"


class Stopping(Silent):
    """Raises once the first block of the last pass is measured."""

    def advance(self, done: int, total: int, unit: str) -> None:
        if (done, total) == (1, 2):
            raise KeyboardInterrupt


def test_an_attempt_that_was_cut_short_is_gone_on_with(frame: Frame, tmp_path: Path) -> None:
    step = step_of("gptq", target_bits=3)
    whole, expected = allotted(frame, step, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        allotted(frame, step, tmp_path / "cut", Stopping())
    shutil.copytree(tmp_path / "cut", tmp_path / "marked")
    assert allotted(frame, step, tmp_path / "cut") == (whole, expected)
    first = tmp_path / "marked" / "block-00000.json"
    found = json.loads(first.read_text())
    found["model.layers.0.self_attn.q_proj"]["8"] = 0.125
    first.write_text(json.dumps(found))
    _, table = allotted(frame, step, tmp_path / "marked")
    assert table.layers[0].trials[-1].divergence_nats == 0.125  # the finished block was not measured again


def test_another_target_measures_nothing_anew(frame: Frame, measured: Path) -> None:
    before = (measured / "errors.json").stat().st_mtime_ns
    _, table = allotted(frame, step_of(target_bits=5), measured)
    assert (measured / "errors.json").stat().st_mtime_ns == before
    assert 4 < table.bits <= 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": "auto"}, "one of target_bits and target_bytes"),
        ({"bits": "auto", "target_bits": 3, "target_bytes": 9}, "one of target_bits and target_bytes"),
        ({"bits": 4, "target_bits": 3}, "target_bits goes with bits `auto`"),
        ({"bits": "auto", "target_bits": 1.5}, "greater than or equal to 2"),
    ],
)
def test_a_step_without_a_clear_target_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RTN.model_validate({"method": "rtn"} | fields)


@pytest.mark.parametrize(
    ("fields", "formats", "words", "param"),
    [
        ({}, ["compressed-tensors", "gptq"], "gptq can't hold.*compressed-tensors can", "steps.0.bits"),
        ({}, ["gguf"], "gguf can't hold", "steps.0.bits"),
        ({"symmetric": False}, ["compressed-tensors"], "zero points", "steps.0.symmetric"),
    ],
)
def test_a_format_that_can_t_mix_is_refused_at_submit(
    fields: dict[str, Any], formats: list[str], words: str, param: str
) -> None:
    spec = spec_of({"method": "rtn", "bits": "auto", "target_bits": 3.5} | fields, formats=formats)
    with pytest.raises(FormatUnfit, match=words) as refused:
        refuse_unfit(spec.steps, spec.formats)
    assert refused.value.param == param


def test_layers_that_can_t_be_mixed_are_refused_from_the_config_alone(tmp_path: Path) -> None:
    FAMILIES["gpt2"](tmp_path / "model")
    spec = spec_of({"method": "rtn", "bits": "auto", "target_bits": 3.5}, formats=["compressed-tensors"])
    with pytest.raises(FormatUnfit, match="several ways"):
        check(spec, tmp_path / "model")


def test_gptq_files_refuse_layers_of_several_numbers_of_bits(frame: Frame) -> None:
    step = step_of(target_bits=3)
    schemes = mixed(engine.schemes_of(frame, step), candidates(step, CT))
    with pytest.raises(FormatUnfit, match="several numbers of bits"):
        layout("gptq").refuse(frame.sites(0), schemes)


def test_the_step_s_own_scheme_is_the_average_rounded_up() -> None:
    assert step_of(target_bits=3.5).scheme().bits == 4
    assert step_of(target_bits=5).scheme().bits == 8
    assert step_of(target_bits=2).scheme().bits == 2
    assert step_of(target_bytes=10**9).scheme().bits == 4
    assert step_of(target_bits=3.5).needs_calibration
    assert not step_of(target_bits=3.5).reads_inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [{"bits": "auto", "target_bits": 3.5}, {"rotation": "hadamard"}], ids=["bits", "rotation"]
)
def test_a_whole_job_is_certified_and_tells_its_story(tmp_path: Path, step: dict[str, Any]) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    text = tmp_path / "text.txt"
    text.write_text(Path(engine.__file__).read_text() * 4, encoding="utf-8")
    spec = spec_of(step, formats=["compressed-tensors"])
    outcome = run(inputs_of(spec, model, text, tmp_path), Silent())
    told = {one.consumer: one.outcome for one in outcome.report.certificates}
    assert told["transformers"] == "passed"
    allocation, rotation = outcome.report.allocation, outcome.report.rotation
    assert (allocation is None, rotation is None) == ("bits" not in step, "rotation" not in step)
    if allocation is not None:
        assert {layer.name: layer.bits for layer in allocation.layers} == {
            layer.name: layer.bits for block in outcome.report.blocks for layer in block.layers
        }
        assert allocation.bits <= 3.5
    if rotation is not None:
        assert rotation.untied_bytes == 2 * 512 * 128
