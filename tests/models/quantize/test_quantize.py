"""The methods on random matrices, against references written the plain way in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.quantize import feedback, gptq, rtn
from models.quantize.problem import Problem, Solution
from models.streaming.statistics import LEAST_ROUNDED, Hessian, Statistics
from models.weights.codes import Codes
from squeeze.errors import FactorisationFailed
from squeeze.steps.quantization import GPTQ, RTN, Quantize

CPU = torch.device("cpu")


def correlated(n: int, columns: int, seed: int) -> Tensor:
    """Inputs (n, columns) whose columns are correlated and differ widely in size, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return (torch.randn(n, columns, generator=generator) @ mixing) * torch.rand(columns, generator=generator).mul(
        3
    ).exp()


def statistics_of(X: Tensor) -> Statistics:
    """Of products in float32: too few tokens at a time to be rounded."""
    statistics = Statistics({"hessian"}, X.shape[1], CPU)
    for few in X.split(LEAST_ROUNDED - 1):
        statistics.add(few)
    return statistics


def solved(method: Any, W: Tensor, statistics: Statistics | None, step: Quantize, dtype: torch.dtype) -> Solution:
    return method.quantize(Problem(W.clone(), statistics, step.scheme(), dtype), step)


def plain_gptq(W: Tensor, X: Tensor, codes: Codes, damping: float, order: Tensor) -> Tensor:
    """Algorithm 1 of the paper without blocks, in float64, on the scales and zeros of `codes`. Returns codes."""
    W, X = W.double()[:, order], X.double()[:, order]
    H = 2 / len(X) * X.T @ X
    H += damping * H.diagonal().mean() * torch.eye(len(H))
    inverse = torch.linalg.inv(H)
    quantized = torch.zeros_like(W)
    for i in range(W.shape[1]):
        group = int(order[i]) // codes.group_size
        scale, zero = codes.scale[:, group].double(), codes.zero[:, group].double()
        q = (torch.round(W[:, i] / scale) + zero).clamp(0, 2**codes.bits - 1)
        quantized[:, order[i]] = q
        error = (W[:, i] - (q - zero) * scale) / inverse[i, i]
        W[:, i:] -= error[:, None] * inverse[i, i:]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
        inverse[i, i] = 1.0  # this column is done; keep the matrix free of zeros on its diagonal
    return quantized.to(torch.uint8)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group_size=st.sampled_from([32, 64, "channel"]),
)
def test_rtn_chooses_the_nearest_code_of_its_grid(seed, bits, symmetric, group_size):
    W = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed)) * 0.05
    columns = 128 if group_size == "channel" else group_size
    step = RTN(method="rtn", bits=bits, symmetric=symmetric, group_size=group_size)
    codes = solved(rtn, W, None, step, torch.float32).encoded
    every = torch.arange(2**bits).view(-1, 1, 1, 1)
    grid = (every - codes.zero.unsqueeze(-1)) * codes.scale.unsqueeze(-1)  # (2^bits, out, groups, 1)
    best = (grid - W.view(24, -1, columns)).abs().amin(dim=0)
    chosen = (codes.dequantize(torch.float32) - W).abs().view(24, -1, columns)
    assert torch.allclose(chosen, best, atol=1e-6)
    assert codes.zero.min() >= 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_weight_of_a_symmetric_group_gets_the_first_code_of_few_bits(sign):
    W = torch.linspace(-0.5, 0.99, 64).view(1, 64) * sign
    for bits in (2, 3, 4):
        codes = solved(rtn, W, None, RTN(method="rtn", bits=bits, group_size=64), torch.float32).encoded
        assert codes.codes[0, -1] == 0 and codes.scale.sign().item() == -sign
    codes = solved(rtn, W, None, RTN(method="rtn", bits=8, group_size=64), torch.float32).encoded
    assert codes.scale.item() > 0


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False), (2, True)])
def test_gptq_gives_the_codes_of_the_paper_s_algorithm(activation_order, bits, symmetric):
    X = correlated(600, 256, seed=bits)
    W = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    step = GPTQ(
        method="gptq", bits=bits, symmetric=symmetric, activation_order=activation_order, group_size=64, damping=0.05
    )
    statistics = statistics_of(X)
    codes = solved(gptq, W, statistics, step, torch.float32).encoded
    order = (
        torch.argsort(statistics.hessian.factor.diagonal, descending=True, stable=True)
        if activation_order
        else torch.arange(256)
    )
    expected = plain_gptq(W, X, codes, 0.05, order)
    # float32 and float64 may fall on either side of a rounding edge, and what follows then differs in that row.
    assert (codes.codes == expected).float().mean() > 0.97


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4]),
    symmetric=st.booleans(),
    activation_order=st.booleans(),
    group_size=st.sampled_from([32, 128, "channel"]),
)
def test_gptq_s_output_error_is_below_round_to_nearest_s(seed, bits, symmetric, activation_order, group_size):
    X = correlated(512, 128, seed)
    W = torch.randn(48, 128, generator=torch.Generator().manual_seed(seed + 1)) * 0.02
    shared = {"bits": bits, "symmetric": symmetric, "group_size": group_size}
    statistics = statistics_of(X)
    step = GPTQ(method="gptq", activation_order=activation_order, **shared)
    ours = solved(gptq, W, statistics, step, torch.float32).encoded
    nearest = solved(rtn, W, None, RTN(method="rtn", **shared), torch.float32).encoded
    errors = [((codes.dequantize(torch.float32) - W) @ X.T).square().sum() for codes in (ours, nearest)]
    assert errors[0] < errors[1]
    assert statistics.error_of(ours.dequantize(torch.float32) - W, W) == pytest.approx(
        float(errors[0] / (W @ X.T).square().sum()), rel=1e-3
    )


def test_linears_with_a_shared_input_share_one_factorisation():
    statistics = statistics_of(correlated(512, 64, 0))
    step = GPTQ(method="gptq", group_size=32)
    first = solved(gptq, torch.randn(16, 64), statistics, step, torch.float32)
    kept = statistics.hessian.factor
    assert kept is not None
    second = solved(gptq, torch.randn(8, 64), statistics, step, torch.float32)
    assert statistics.hessian.factor is kept
    assert first.damping == second.damping == 0.01


def test_a_column_that_was_never_active_is_rounded_to_nearest():
    X = correlated(512, 64, 3)
    X[:, 10:20] = 0
    W = torch.randn(16, 64) * 0.1
    codes = solved(gptq, W, statistics_of(X), GPTQ(method="gptq", group_size=32), torch.float32).encoded
    back = codes.dequantize(torch.float32)
    half_a_step = codes.scale.repeat_interleave(32, dim=1)[:, 10:20] / 2
    outermost = codes.scale.repeat_interleave(32, dim=1)[:, 10:20] * 7.5
    inside = W[:, 10:20].abs() <= outermost
    assert ((back - W)[:, 10:20].abs() <= half_a_step + 1e-6)[inside].all()


def test_too_little_text_for_a_definite_hessian_escalates_the_damping_and_counts_it():
    direction = torch.randn(1, 64).repeat(40, 1) * 1e4  # one direction alone: rank one
    step = GPTQ(method="gptq", group_size=32, damping=1e-9)
    solution = solved(gptq, torch.randn(16, 64), statistics_of(direction), step, torch.float32)
    assert solution.escalations > 0
    assert solution.damping == pytest.approx(1e-9 * feedback.DAMPING_FACTOR**solution.escalations)


def test_too_few_tokens_for_the_columns_are_rounded_to_nearest_and_say_so():
    W = torch.randn(16, 64)
    step = GPTQ(method="gptq", group_size=32)
    few = solved(gptq, W, statistics_of(correlated(31, 64, 0)), step, torch.float32)
    nearest = solved(rtn, W, None, RTN(method="rtn", group_size=32), torch.float32)
    assert few.instead == "rtn: 31 calibration tokens came to 64 columns"
    assert torch.equal(few.encoded.codes, nearest.encoded.codes)
    assert solved(gptq, W, statistics_of(correlated(32, 64, 0)), step, torch.float32).instead is None


@pytest.mark.parametrize("bits", [4, 2])
def test_asymmetric_calibration_brings_outputs_closer_to_those_of_the_uncompressed_model(bits):
    originals = correlated(600, 128, 0)
    X = originals + 0.2 * correlated(600, 128, 1)
    W = torch.randn(48, 128, generator=torch.Generator().manual_seed(2)) * 0.05
    errors = []
    for step in (
        GPTQ(method="gptq", bits=bits, group_size=64),
        GPTQ(method="gptq", bits=bits, group_size=64, asymmetric_calibration=True),
    ):
        statistics = Statistics(step.wanted(), 128, CPU)
        statistics.add(X.view(6, 100, 128), originals.view(6, 100, 128))
        weight = solved(gptq, W, statistics, step, torch.float32).encoded.dequantize(torch.float32)
        errors.append(float((weight @ X.T - W @ originals.T).square().sum()))
    assert errors[1] < 0.9 * errors[0]


def test_inputs_that_did_not_change_make_asymmetric_calibration_the_plain_one():
    X = correlated(600, 128, 0)
    W = torch.randn(48, 128) * 0.05
    step = GPTQ(method="gptq", group_size=64, asymmetric_calibration=True)
    statistics = Statistics(step.wanted(), 128, CPU)
    for few in X.split(LEAST_ROUNDED - 1):
        statistics.add(few[None], few[None])
    plain = solved(gptq, W, statistics_of(X), GPTQ(method="gptq", group_size=64), torch.float32)
    codes = solved(gptq, W, statistics, step, torch.float32).encoded.codes
    assert (codes == plain.encoded.codes).float().mean() > 0.99  # summed in another order


def with_outliers(X: torch.Tensor) -> torch.Tensor:
    """Some columns much larger than others, and now and then a token that is far off in a few, as models have them."""
    X = X * torch.logspace(-1, 1, X.shape[1])
    X[::256, :4] += 300.0
    return X.bfloat16()


def test_a_model_in_bfloat16_gets_codes_as_good_as_those_of_exact_products():
    X = with_outliers(correlated(2048, 512, 0))
    W = (torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * 0.05).bfloat16().float()
    step = GPTQ(method="gptq", group_size=64)
    rounded = Statistics(step.wanted(), 512, CPU)
    rounded.add(X)
    errors = []
    for statistics, dtype in ((statistics_of(X), torch.float32), (rounded, torch.bfloat16)):
        encoded = solved(gptq, W, statistics, step, dtype).encoded
        errors.append(float(((encoded.dequantize(torch.float32) - W) @ X.float().T).square().sum()))
    assert errors[1] < 1.02 * errors[0]


def test_inputs_rounded_to_8_bits_change_no_entry_of_the_hessian_by_more_than_was_promised():
    X = with_outliers(correlated(4096, 600, 0))
    rounded, exact = Hessian(600, CPU), statistics_of(X).hessian
    rounded.add(X)
    true = 2 / 4096 * X.double().T @ X.double()
    assert torch.allclose(exact.matrix.double(), true, rtol=1e-4, atol=1e-5)
    assert torch.equal(rounded.matrix, rounded.matrix.T)
    energy = true.diagonal()
    assert float(((rounded.matrix.diagonal() - energy) / energy).abs().max()) < 0.0055
    difference = (rounded.matrix - true) / energy.outer(energy).sqrt()
    assert float(difference.abs().max()) < 0.01
    assert float(difference.square().mean().sqrt()) < 0.0005


def test_the_factor_tells_the_same_output_errors_as_the_sum_that_it_replaces():
    X, W = correlated(1024, 96, 2), torch.randn(32, 96)
    statistics = statistics_of(X)
    before = statistics.error_of(W * 0.1, W), statistics.hessian.energy(W)
    solved(gptq, W, statistics, GPTQ(method="gptq", group_size=32), torch.float32)
    assert statistics.hessian.factor is not None
    assert (statistics.error_of(W * 0.1, W), statistics.hessian.energy(W)) == pytest.approx(before, rel=1e-4)


def test_a_hessian_with_nan_is_an_error_not_a_silent_fallback():
    broken = statistics_of(torch.full((16, 32), float("nan")))
    with pytest.raises(FactorisationFailed, match="calibration text"):
        solved(gptq, torch.randn(16, 32), broken, GPTQ(method="gptq", group_size=32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_survive_the_types_that_formats_store(dtype):
    W = torch.randn(32, 128) * torch.logspace(-6, 2, 32).unsqueeze(1)
    scale = solved(rtn, W, None, RTN(method="rtn", group_size=64), dtype).encoded.scale
    assert torch.equal(scale.half().float(), scale)
    if dtype == torch.bfloat16:
        normal = scale >= 2.0**-14
        assert torch.equal(scale.bfloat16().float()[normal], scale[normal])
