"""Zeros and codes in one step: chosen as SparseGPT does, exactly zero in every format, told of together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.formats import layout
from models.pipeline import check, run
from models.progress import Silent
from models.prune import sparsegpt
from models.prune.zeroing.counting import counted_codes, saved_by_zeros
from models.quantize import gptq
from models.quantize.problem import Problem
from models.streaming import engine
from models.streaming.statistics import Statistics
from squeeze.errors import SpecInvalid
from squeeze.names import Format
from squeeze.steps.quantization import GPTQ, QAT
from squeeze.steps.sparsifying import SparseGPT
from tests.models.engine_parts import frame_of, thrown
from tests.models.job_parts import Heard, inputs_of
from tests.models.prune.parts import spec_of
from tests.models.prune.test_methods import statistics_of, weights, zeros_of
from tests.models.quantize.test_quantize import CPU, correlated
from tests.models.tiny import FAMILIES

TARGETS: list[dict[str, Any]] = [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": "2:4"}]


def rounded(W: Tensor, X: Tensor, step: GPTQ, heights: tuple[int, ...] = ()) -> Tensor:
    problem = Problem(W.clone(), statistics_of(X), step.scheme(), torch.float32, heights=heights)
    result: Tensor = gptq.quantize(problem, step).encoded.dequantize(torch.float32)
    return result


def joint(target: dict[str, Any], **fields: Any) -> GPTQ:
    return GPTQ.model_validate({"method": "gptq", "group_size": 32} | target | fields)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_sparsegpt_would_zero_is_exactly_zero_in_the_codes(target: dict[str, Any], symmetric: bool) -> None:
    W, X = weights(40, 256), correlated(900, 256, 0)
    result = rounded(W, X, joint(target, symmetric=symmetric, activation_order=False), (24, 16))
    step = SparseGPT.model_validate({"method": "sparsegpt"} | target)
    problem = Problem(W.clone(), statistics_of(X), step.scheme(), torch.float32, heights=(24, 16))
    pruned = sparsegpt.prune(problem, step).encoded.dequantize(torch.float32)
    assert (result[pruned == 0] == 0).all() and (result != 0).float().mean() > 0.8 * (pruned != 0).float().mean()


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_both_together_change_the_outputs_no_more_than_one_after_the_other(
    target: dict[str, Any], activation_order: bool
) -> None:
    W, X = weights(64, 256, 3), correlated(1200, 256, 3)
    both = rounded(W, X, joint(target, activation_order=activation_order))
    step = SparseGPT.model_validate({"method": "sparsegpt"} | target)
    problem = Problem(W.clone(), statistics_of(X), step.scheme(), torch.float32)
    pruned = sparsegpt.prune(problem, step).encoded.dequantize(torch.float32)
    after = rounded(pruned, X, joint({}, activation_order=activation_order))
    errors = [float(((one - W) @ X.T).square().sum()) for one in (both, after)]
    assert errors[0] < 1.02 * errors[1]
    if target.get("pattern"):
        assert min(zeros_of(both, (2, 4))) == 2


def test_a_linear_with_few_tokens_loses_its_smallest_weights_and_is_rounded_to_nearest() -> None:
    W, step = weights(16, 128), joint({"pattern": "2:4"})
    statistics = Statistics({"hessian"}, 128, CPU)
    statistics.add(correlated(20, 128, 1))
    solution = gptq.quantize(Problem(W, statistics, step.scheme(), torch.float32), step)
    assert min(zeros_of(solution.encoded.dequantize(torch.float32), (2, 4))) == 2 and solution.instead


def test_every_format_holds_the_zeros(tmp_path: Path) -> None:
    model, windows = FAMILIES["llama"](tmp_path / "model"), thrown(8)
    step, source = joint({"pattern": "2:4"}), open_model(model)
    done = engine.quantize(frame_of(model), step, windows.ids, None, tmp_path / "work", "", Silent())
    formats: tuple[Format, ...] = ("compressed-tensors", "gptq", "awq", "gguf")
    for name in formats:
        layout(name).write(source, done.model, tmp_path / name, Silent())
        for site in done.model.sites:
            zeros = layout(name).read(tmp_path / name, site).dequantize(torch.float32) == 0
            assert torch.equal(zeros, done.model.codes(site).dequantize(torch.float32) == 0)
    counted = counted_codes(source, tmp_path / "gptq", done.model)
    assert counted.reached >= 0.5 and counted.pattern == "2:4" and counted.quantized
    assert counted.rows_checked == sum(site.rows for site in done.model.sites.values())
    assert "take as many bits as any" in saved_by_zeros(counted) and counted.zstd_bytes < counted.weight_bytes


def test_what_can_t_be_both_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="leave `sparsity` out"):
        joint({"sparsity": 0.6, "pattern": "2:4"})
    assert not {"sparsity", "pattern"} & set(QAT.model_fields)
    model = FAMILIES["llama"](tmp_path / "model", intermediate_size=260)
    spec = spec_of({"kind": "quantize", "method": "gptq", "group_size": "channel", "pattern": "4:8"})
    with pytest.raises(SpecInvalid, match="Take 2:4, which fits all layers"):
        check(spec, model)


@pytest.mark.slow
def test_a_job_tells_of_bits_and_zeros_and_transformers_loads_what_it_wrote(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    formats = ["compressed-tensors", "gptq", "awq"]
    step = {"kind": "quantize", "method": "gptq", "group_size": 32, "sparsity": 0.6}
    heard = Heard()
    report = run(inputs_of(spec_of(step, formats=formats), model, None, tmp_path), heard).report
    assert report.sparsity is not None and report.sparsity.reached >= 0.6 and report.bits_per_weight == 4.5
    assert report.warnings[0] == saved_by_zeros(report.sparsity) and report.warnings[0] in heard.messages
    assert {one.outcome for one in report.certificates if one.consumer == "transformers"} == {"passed"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "compressed-tensors")
    loaded(torch.arange(8)[None])  # unpacks
    assert (loaded.model.layers[0].mlp.up_proj.weight == 0).float().mean() >= 0.6
