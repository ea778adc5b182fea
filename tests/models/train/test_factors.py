"""Linears that an earlier step of the job wrote as factors learn as these: the rank stays, whatever trains them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from models.files.checkpoint import open_model
from models.formats import layout
from models.job import Inputs, Outcome
from models.pipeline import check, run
from models.progress import Silent
from models.prune.factors.factoring import saved_by_factors
from models.prune.factors.handed import HandedFactors
from models.train.factors import LearningFactors, multiply_out, put
from models.train.whole import load_whole
from squeeze.errors import FormatUnfit, SpecInvalid
from squeeze.objects import Stage
from squeeze.reports.factoring import FactoredLayer
from squeeze.reports.report import Factoring, Speed
from squeeze.specs.formats import refuse_unfit
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.factoring import SVD
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.prune.slim_parts import text
from tests.models.prune.svd_parts import factored
from tests.models.test_rounds import GPTQ, LOGITS, Stopped, Torn, untouched
from tests.models.tiny import FAMILIES
from tests.models.train.parts import begin, go_on, inputs_for, spec_of

SVD_STEP = {"kind": "prune", "method": "svd", "params_target": 0.7}
FULL = {"kind": "finetune", "method": "full", "steps": 2, "batch_size": 2, "learning_rate": 1e-3}
SPEED = Speed(prompt=1.0, prompt_tokens=1, writing=1.0, written_tokens=1)


def handed(model: Path, room: Path, **fields: Any) -> tuple[Path, HandedFactors]:
    """(the plain model, its factors), as a step leaves them."""
    step = SVD(method="svd", **{"params_target": 0.7} | fields)
    made, told = factored(model, room, step)
    plain = room / "plain"
    layout("safetensors").write(open_model(model), made, plain, Silent())
    layers = [
        FactoredLayer(
            name=name,
            rows=told.sides[name].rows,
            columns=told.sides[name].columns,
            rank=cut.rank,
            basis=cut.basis,
            parameters=0,
            energy_kept=None,
        )
        for name, cut in told.cuts.items()
    ]
    report = Factoring(
        method="svd",
        target=0.7,
        measure="",
        parameters_before=100,
        parameters_after=70,
        factor_bytes=0,
        linears=len(layers),
        factored=len(made.sites),
        shared=0,
        lost=None,
        layers=layers,
        speed_before=SPEED,
        speed_factored=SPEED,
        speed_merged=SPEED,
    )
    return plain, HandedFactors(made.directory, report)


def learning(tmp_path: Path, family: str = "llama", **fields: Any) -> Inputs:
    plain, factors = handed(FAMILIES[family](tmp_path / "model"), tmp_path / "svd", **fields)
    return replace(inputs_for(spec_of({"method": "full"}), plain, tmp_path / "room"), factors=factors)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # (out, in) weights, shared factors; (in, out) weights, biases
def test_factors_give_what_their_product_gives_and_both_learn(tmp_path: Path, family: str) -> None:
    inputs = learning(tmp_path, family)
    assert inputs.factors is not None
    plain = load_whole(inputs.model, torch.float32, torch.device("cpu"))
    thin = load_whole(inputs.model, torch.float32, torch.device("cpu"))
    model = inputs.factors.of(open_model(inputs.model))
    put(thin, model)
    ids = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(thin(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
    _, task = begin(inputs)
    linears = {name: one for name, one in task.model.named_modules() if isinstance(one, LearningFactors)}
    assert set(linears) == set(model.schemes)
    bases = {scheme.basis for scheme in model.schemes.values()}
    assert len({id(one.right) for one in linears.values()}) == len(bases)
    assert len(bases) < len(linears) or family != "llama", "some linears share a factor"
    task.model(ids, labels=ids).loss.backward()
    plain.requires_grad_(True)
    plain(ids, labels=ids).loss.backward()

    def gradient(name: str) -> Tensor:
        found: Tensor = plain.get_submodule(name).weight.grad
        return found.T if model.sites[name].transposed else found

    for basis in bases:  # of W = L R: dL = dW Rᵀ, and dR the sum of Lᵀ dW of all that share R
        sharing = [name for name, scheme in model.schemes.items() if scheme.basis == basis]
        for name in sharing:
            expected = gradient(name) @ linears[name].right.detach().T
            torch.testing.assert_close(linears[name].left.grad, expected, rtol=2e-2, atol=2e-3)
        expected = torch.stack([linears[name].left.detach().T @ gradient(name) for name in sharing]).sum(0)
        torch.testing.assert_close(linears[sharing[0]].right.grad, expected, rtol=2e-2, atol=2e-3)


def test_what_is_written_is_the_product_and_has_the_rank_of_the_factors(tmp_path: Path) -> None:
    inputs = learning(tmp_path)
    before = {name: one.detach().clone() for name, one in begin(inputs)[1].learning.items()}
    task, _ = go_on(inputs)
    moved = [name for name, one in task.learning.items() if not torch.equal(one.detach(), before[name])]
    assert set(moved) == set(before) and any(name.endswith(".right") for name in moved)
    assert inputs.factors is not None
    schemes = inputs.factors.of(open_model(inputs.model)).schemes
    linears = {name: task.model.get_submodule(name) for name in schemes}
    products = {name: (one.left.double() @ one.right.double()).detach() for name, one in linears.items()}
    multiply_out(task.model, open_model(inputs.model))
    for name, product in products.items():
        weight = task.model.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.double(), product, rtol=2**-8, atol=1e-6)
        values = torch.linalg.svdvals(weight.double())
        rounding = 2**-8 * float(product.norm())
        assert float(values[schemes[name].rank :].norm()) <= rounding < float(values[: schemes[name].rank].norm())


def chain(*steps: dict[str, Any], formats: list[str]) -> JobSpec:
    data = {"source": "file-abcdefgh", "samples": 4, "sequence_length": 64}
    return JobSpec.model_validate(
        {"model": "org/model", "steps": steps, "data": data, "evaluation": {"samples": 2}, "formats": formats}
    )


def taught(model: Path, room: Path, formats: list[str]) -> Outcome:
    """By the original, in a job that is torn before it learns."""
    spec = chain(SVD_STEP, LOGITS | {"learning_rate": 1e-3}, formats=formats)
    inputs = inputs_of(spec, model, text(room / "text"), room)
    inputs.work.mkdir()
    with pytest.raises(Torn):
        run(inputs, Stopped(Stage.training, 1))
    with untouched(inputs.work / "round-0"):
        return run(inputs, Heard())


def test_factors_are_taught_by_the_original_and_the_report_counts_them(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=1)
    report = taught(model, tmp_path, ["safetensors"]).report
    told, training = report.factoring, report.training
    assert told is not None and training is not None and training.distillation is not None
    assert report.warnings[0] == saved_by_factors(told, ["safetensors"]) and "ask for onnx" in report.warnings[0]
    assert training.trainable_parameters == told.parameters_after == training.distillation.student_parameters
    assert report.rounds[0].parameters == told.parameters_after and told.quality == report.rounds[0].quality
    assert training.distillation.teacher_parameters == open_model(model).parameters == report.source.parameters
    assert told.factor_bytes == open_model(model).weight_bytes - 2 * (told.parameters_before - told.parameters_after)
    plain, before = (
        load_file(directory / "safetensors" / "model.safetensors")
        for directory in (tmp_path / "out", tmp_path / "work" / "round-0" / "out")
    )
    for name in (f"{one.name}.weight" for one in told.layers if one.rank is not None):
        assert plain[name].shape == before[name].shape and not torch.equal(plain[name], before[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's exporter, about itself
@pytest.mark.parametrize("formats", [["safetensors", "onnx"], ["onnx"]])
def test_onnx_holds_what_factors_learned_and_is_certified_by_its_own_loss(tmp_path: Path, formats: list[str]) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=1)
    outcome = taught(model, tmp_path, formats)
    report, told = outcome.report, outcome.report.factoring
    assert told is not None and report.warnings[0] == saved_by_factors(told, formats)  # type: ignore[arg-type]
    assert "onnx holds" in report.warnings[0] and not any("ask for onnx" in warning for warning in report.warnings)
    checked = {one.consumer: one for one in report.certificates if one.outcome != "not checked"}
    assert {one.outcome for one in checked.values()} == {"passed"}
    assert checked["onnxruntime"].perplexity is not None
    sizes = {size.format: size for size in report.sizes}
    assert set(sizes) == set(formats) and outcome.result.compression_ratio == sizes["onnx"].ratio
    assert sizes["onnx"].weight_bytes < 0.95 * open_model(model).weight_bytes
    whole = tmp_path / ("out/safetensors" if "safetensors" in formats else "work/round-1/whole")
    plain = load_file(whole / "model.safetensors")
    for layer in (one for one in told.layers if one.rank is not None):
        factors = layout("onnx").read(outcome.directories["onnx"], layer.name)
        merged, weight = factors.dequantize(torch.float32), plain[f"{layer.name}.weight"].float()
        torch.testing.assert_close(merged, weight, rtol=0.05, atol=0.02 * float(weight.abs().max()))


@pytest.mark.slow
def test_a_row_of_trainings_hands_factors_on_and_what_quantizes_takes_the_product(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=torch.bfloat16)
    spec = chain(FULL, SVD_STEP, FULL, LOGITS, GPTQ, formats=["compressed-tensors"])
    inputs = inputs_of(spec, model, text(tmp_path / "text"), tmp_path / "room")
    inputs.work.mkdir()
    report = run(inputs, Heard()).report
    told = report.factoring
    assert told is not None and report.bits_per_weight == 4.5 and "multiplied out again" in report.warnings[0]
    assert [one.steps for one in report.rounds] == [[0, 1], [2]]
    learned = [one.training for one in (report.rounds[1], report)]
    assert [one.trainable_parameters for one in learned if one] == [told.parameters_after] * 2
    whole = inputs.work / "round-2" / "whole" / "model.safetensors"
    for name, weight in load_file(whole).items():
        rank = {f"{one.name}.weight": one.rank for one in told.layers}.get(name)
        if rank is not None:
            values = torch.linalg.svdvals(weight.double())
            assert float(values[rank:].norm()) <= 2**-8 * float(values.norm())


@pytest.mark.parametrize(
    ("steps", "fields", "words"),
    [
        ([{"kind": "finetune", "method": "lora", "merge": True}], {}, "`full` and distillations learn in the place"),
        ([{"kind": "finetune", "method": "last_layers"}], {}, "`full` and distillations learn in the place"),
        ([FULL, {"kind": "prune", "method": "wanda"}], {}, "keep one of svd"),
        ([FULL, {"kind": "prune", "method": "depth", "blocks": 1}], {}, "depth would not keep"),
        ([FULL], {"limits": {"gpus": 2}}, "set limits.gpus to 1"),
        ([LOGITS | {"student": {"layers": 1}}], {}, "leave `student` out"),
    ],
)
def test_what_would_not_keep_factors_is_refused_with_what_does(
    steps: list[dict[str, Any]], fields: dict[str, Any], words: str
) -> None:
    asked = {"model": "org/model", "steps": [SVD_STEP, *steps], "data": {"source": "file-abcdefgh"}}
    with pytest.raises(ValidationError, match=words):
        JobSpec.model_validate(asked | fields)


def test_onnx_holds_what_trains_behind_factors_alone_and_experts_are_left_out(tmp_path: Path) -> None:
    both = ["safetensors", "onnx"]
    refuse_unfit(chain(SVD_STEP, FULL, formats=both).steps, both)  # type: ignore[arg-type]
    with pytest.raises(FormatUnfit, match="onnx can't hold what full makes"):
        refuse_unfit(chain(FULL, formats=both).steps, both)  # type: ignore[arg-type]
    model = FAMILIES["mixtral"](tmp_path / "model")
    with pytest.raises(SpecInvalid, match="factors of experts can't learn") as refused:
        check(chain(SVD_STEP, FULL, formats=["safetensors"]), model)
    assert refused.value.param == "steps.0.ignore"
    least = SVD_STEP | {"ignore": ["*.experts.*"], "params_target": 0.97}
    assert check(chain(least, FULL, formats=["safetensors"]), model).blocks == 2
    with pytest.raises(FormatUnfit, match="onnx can't hold mixtral"):
        check(chain(least, FULL, formats=both), model)


@pytest.mark.slow
def test_a_round_that_trained_leaves_what_the_next_attempt_hands_on(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=1)
    words = text(tmp_path / "text")

    def room(name: str) -> Inputs:
        inputs = inputs_of(chain(SVD_STEP, FULL, FULL, formats=["safetensors"]), model, words, tmp_path / name)
        inputs.work.mkdir()
        return inputs

    quiet = run(room("quiet"), Heard())
    torn = room("torn")
    with pytest.raises(Torn):
        run(torn, Stopped(Stage.training, 2))
    with untouched(torn.work / "round-1"):
        again = run(torn, Heard())
    assert digests(tmp_path / "torn" / "out") == digests(tmp_path / "quiet" / "out")
    kept = [one.report.factoring for one in (quiet, again)]
    assert kept[0] is not None and kept[1] is not None and kept[0].layers == kept[1].layers
