"""AWQ: what it searches for, against a search written the plain way, and what its results say once they are stored."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.formats import layout
from models.progress import Silent
from models.quantize import awq, rtn
from models.quantize.problem import Problem
from models.streaming.statistics import Statistics
from squeeze.names import Format
from squeeze.steps.quantization import AWQ, RTN
from tests.models.engine_parts import compressed, frame_of, thrown
from tests.models.quantize.test_quantize import correlated, statistics_of
from tests.models.tiny import FAMILIES


def problem_of(W: Tensor, X: Tensor, step: AWQ, ties: Tensor | None = None) -> Problem:
    return Problem(W.clone(), statistics_of(X), step.scheme(), torch.float32, ties=ties)


def outputs_apart(codes: Tensor, W: Tensor, X: Tensor) -> float:
    return float(((codes - W) @ X.T).square().sum() / (W @ X.T).square().sum())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (3, False), (2, True)])
def test_the_scale_is_the_best_of_a_plain_search_over_the_tokens_themselves(bits: int, symmetric: bool) -> None:
    X, W = correlated(400, 128, seed=bits), torch.randn(48, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    step = AWQ(method="awq", bits=bits, symmetric=symmetric, group_size=32, grid=10)
    found = awq.fold(problem_of(W, X, step), step)

    errors: list[tuple[float, Tensor]] = []
    for n in range(11):
        s = X.double().square().mean(dim=0).sqrt() ** (n / 10)
        s = (s / (s.max() * s.min()).sqrt()).float()
        rounded = awq.quantize(problem_of(W * s, X / s, step), step).encoded.dequantize(torch.float32)
        errors.append((outputs_apart(rounded / s, W, X), s))
    assert found is not None
    chosen = next(error for error, s in errors if torch.allclose(found, s, rtol=1e-4))
    assert chosen <= min(error for error, _ in errors) * 1.001


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (2, False)])
def test_scaling_and_clipping_each_lower_the_output_error(bits: int, symmetric: bool) -> None:
    X, W = correlated(600, 256, seed=7), torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    step = AWQ(method="awq", bits=bits, symmetric=symmetric, group_size=64)
    nearest = rtn.quantize(problem_of(W, X, step), RTN(method="rtn", bits=bits, symmetric=symmetric, group_size=64))
    clipped = awq.quantize(problem_of(W, X, step), step)
    s = awq.fold(problem_of(W, X, step), step)
    assert s is not None
    both = awq.quantize(problem_of(W * s, X / s, step), step)

    errors = [
        outputs_apart(nearest.encoded.dequantize(torch.float32), W, X),
        outputs_apart(clipped.encoded.dequantize(torch.float32), W, X),
        outputs_apart(both.encoded.dequantize(torch.float32) / s, W, X),
    ]
    assert errors[2] < errors[1] < errors[0]


def test_columns_that_come_from_one_output_share_a_scale() -> None:
    X, W = correlated(400, 128, seed=1), torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    ties = torch.arange(64).repeat(2)
    s = awq.fold(problem_of(W, X, step := AWQ(method="awq", group_size=32), ties), step)
    assert s is not None
    assert torch.equal(s[:64], s[64:])
    assert len(s.unique()) > 32


def test_inputs_that_are_all_alike_need_no_scale() -> None:
    X, W = torch.eye(64).repeat(4, 1), torch.randn(16, 64)
    assert awq.fold(problem_of(W, X, step := AWQ(method="awq", group_size=32)), step) is None


def test_an_input_that_was_never_active_leaves_the_scales_finite() -> None:
    X = correlated(400, 64, seed=2)
    X[:, 5] = 0
    W = torch.randn(16, 64)
    step = AWQ(method="awq", bits=2, group_size=32)
    s = awq.fold(problem_of(W, X, step), step)
    assert s is None or (torch.isfinite(s).all() and (s > 0).all())


def test_without_statistics_it_says_what_it_needs() -> None:
    step = AWQ(method="awq", group_size=32)
    with pytest.raises(ValueError, match="Hessian"):
        awq.quantize(
            Problem(torch.randn(8, 32), Statistics((), 32, torch.device("cpu")), step.scheme(), torch.float32), step
        )


@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("llama", torch.float32, {}),
        ("llama", torch.bfloat16, {"num_key_value_heads": 4}),
        ("gemma", torch.bfloat16, {}),
        ("opt", torch.float32, {}),
        ("gpt2", torch.float32, {}),
    ],
)
def test_what_took_a_scale_over_is_stored_as_it_was_measured(
    tmp_path: Path, family: str, dtype: torch.dtype, changes: dict[str, int]
) -> None:
    model, windows = FAMILIES[family](tmp_path / "model", dtype=dtype, **changes), thrown()
    done, quality = compressed(model, tmp_path / "work", AWQ(method="awq", bits=4, group_size=32), windows)
    plain, rounded = compressed(model, tmp_path / "nearest", RTN(method="rtn", bits=4, group_size=32), windows)

    changed = {name for name in done.model.changed() if name.endswith(".weight")}
    assert changed
    assert not plain.model.changed()
    assert quality.divergence_nats is not None and rounded.divergence_nats is not None
    assert quality.divergence_nats < rounded.divergence_nats

    layout("compressed-tensors").write(frame_of(model).source, done.model, tmp_path / "out", Silent())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    with torch.no_grad():
        logits = torch.cat([loaded(row[None]).logits[:, :-1].float() for row in windows.ids])
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.ids[:, 1:].flatten())
    exact = 1e-4 if dtype == torch.float32 else 4e-3
    assert float(nll.exp()) == pytest.approx(quality.perplexity_after, rel=exact)


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors"])
def test_every_integer_format_holds_what_it_makes(tmp_path: Path, name: Format) -> None:
    model, windows = FAMILIES["qwen2"](tmp_path / "model", dtype=torch.bfloat16), thrown()
    step = AWQ(method="awq", group_size=64, symmetric=name == "compressed-tensors")
    done, _ = compressed(model, tmp_path / "work", step, windows)
    layout(name).write(frame_of(model).source, done.model, tmp_path / "out", Silent())
    for site in done.model.sites:
        read, kept = layout(name).read(tmp_path / "out", site), done.model.codes(site)
        assert torch.equal(read.dequantize(torch.float32), kept.dequantize(torch.float32))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_is_clipped_where_its_group_s_own_part_of_the_outputs_errs_least(symmetric: bool) -> None:
    X, W = correlated(300, 64, seed=5), torch.randn(6, 64, generator=torch.Generator().manual_seed(2)) ** 3
    H = (X.T @ X).double()
    scale, zero = awq.clip(W.view(6, 2, 32), awq.diagonal_blocks(H.float(), 32), 3, symmetric, torch.float32)
    for row, group in ((0, 0), (3, 1), (5, 0)):
        part, own = W.view(6, 2, 32)[row, group].double(), X.view(300, 2, 32)[:, group].double()

        def erring(s: float, z: float, part: Tensor = part, own: Tensor = own) -> float:
            codes = (torch.round(part / s) + z).clamp(0, 7)
            return float((((codes - z) * s - part) @ own.T).square().sum())

        high, low = max(float(part.max()), 0.0), min(float(part.min()), 0.0)
        if symmetric:
            largest = high if high > -low else low  # the first code's
            high, low = -largest, largest
        trials = []
        for shrink in torch.linspace(1, awq.CLIP_LEAST[3], awq.CLIP_STEPS).tolist():
            s = float(torch.tensor((high - low) * shrink / 7).half())
            trials.append(erring(s, 4.0 if symmetric else min(max(round(-low * shrink / s), 1), 7)))
        assert erring(float(scale[row, group]), float(zero[row, group])) == pytest.approx(min(trials), rel=1e-3)
