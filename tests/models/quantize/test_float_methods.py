"""Methods that store floating-point numbers of eight and four bits, and SmoothQuant, against plain references."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.quantize import fp8, mxfp4, nvfp4, smoothquant
from models.quantize.problem import Problem, Solution
from models.streaming.activations import rounded
from models.streaming.statistics import Statistics
from models.weights.codes import Codes
from models.weights.float_codes import E2M1, Float4Codes, Float8Codes
from squeeze.steps.quantization import FP8, MXFP4, NVFP4, Quantize, SmoothQuant, Statistic

VALUES = torch.tensor(sorted({*E2M1, *(-value for value in E2M1)}))
CPU = torch.device("cpu")


def weights(rows: int = 24, columns: int = 128, seed: int = 0) -> Tensor:
    """With heavy tails, as trained ones have, and rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.1)
    return W * (1 + torch.randn(rows, columns, generator=generator).abs() ** 3 / 4)


def problem_of(
    W: Tensor,
    step: Quantize,
    X: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    heights: tuple[int, ...] = (),
) -> Problem:
    statistics = None
    if X is not None:
        wanted: tuple[Statistic, ...] = ("moments", "hessian")
        statistics = Statistics(wanted, W.shape[1], CPU)
        statistics.add(X)
    return Problem(W.clone(), statistics, step.scheme(), dtype)


def error_of(solution: Solution, W: Tensor) -> float:
    return float((solution.encoded.dequantize(torch.float32) - W).square().sum())


def nearest_e2m1(values: Tensor) -> Tensor:
    """By looking at all of them; of two as near, either."""
    return VALUES[(values.unsqueeze(-1) - VALUES).abs().argmin(dim=-1)]


@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_fp8_is_at_least_as_near_as_the_scale_that_puts_the_largest_weight_at_448(scales: str) -> None:
    W, step = weights(), FP8.model_validate({"method": "fp8", "weight_scales": scales})
    largest = W.abs().amax(dim=1, keepdim=True) if scales == "channel" else W.abs().max()
    usual = (W / (largest / 448)).to(torch.float8_e4m3fn).float() * (largest / 448)

    solution = fp8.quantize(problem_of(W, step), step)

    assert error_of(solution, W) < float((usual - W).square().sum())
    encoded = solution.encoded
    assert isinstance(encoded, Float8Codes)
    assert len(set(encoded.scale.flatten().tolist())) == (len(W) if scales == "channel" else 1)
    assert (encoded.scale >= largest / 448 * 0.999).all()  # nothing is clipped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_scales_are_what_the_model_s_own_type_holds(dtype: torch.dtype) -> None:
    step = FP8(method="fp8")

    encoded = fp8.quantize(problem_of(weights(), step, dtype=dtype), step).encoded

    assert isinstance(encoded, Float8Codes)
    assert torch.equal(encoded.scale, encoded.scale.to(dtype).float())


def test_mxfp4_is_at_least_as_near_as_the_specification_s_own_exponents() -> None:
    W, step = weights(), MXFP4(method="mxfp4")
    blocks = W.view(len(W), -1, 32)
    scale = 2.0 ** (torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - 2)  # OCP MX v1.0 §6.3
    ruled = nearest_e2m1(blocks / scale) * scale

    solution = mxfp4.quantize(problem_of(W, step), step)

    assert error_of(solution, W) <= float((ruled - blocks).square().sum()) * 1.01  # what is unpacked is bfloat16
    encoded = solution.encoded
    assert isinstance(encoded, Float4Codes)
    assert (torch.log2(encoded.real_scale / scale[..., 0]).abs() <= 1).all()


def test_nvfp4_is_nearer_than_blocks_that_all_reach_to_six() -> None:
    W, step = weights(), NVFP4(method="nvfp4")
    blocks = W.view(len(W), -1, 16)
    divisor = 448 * 6 / W.abs().max()
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 * divisor).to(torch.float8_e4m3fn).float() / divisor
    usual = nearest_e2m1(blocks / scale) * scale

    solution = nvfp4.quantize(problem_of(W, step), step)

    assert error_of(solution, W) < 0.9 * float((usual - blocks).square().sum())


def test_linears_that_are_solved_together_share_the_scale_of_a_whole_tensor() -> None:
    W = torch.cat([weights(8), 3 * weights(8, seed=1)])
    for step, method in ((NVFP4(method="nvfp4"), nvfp4), (FP8(method="fp8", weight_scales="tensor"), fp8)):
        both = method.quantize(problem_of(W, step), step).encoded
        parts = [both.rows(0, 8).tensors(), both.rows(8, 16).tensors()]
        name = "divisor" if isinstance(both, Float4Codes) else "scale"
        assert torch.equal(parts[0][name], parts[1][name])
        assert parts[0][name].data_ptr() != parts[1][name].data_ptr()


@pytest.mark.parametrize("step", [FP8(method="fp8"), MXFP4(method="mxfp4"), NVFP4(method="nvfp4")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_of_zeros_and_of_the_smallest_numbers_come_out_finite(step: Quantize, dtype: torch.dtype) -> None:
    W = torch.stack([torch.zeros(64), torch.full((64,), 1e-38), torch.linspace(-1, 1, 64)])
    method = {"fp8": fp8, "mxfp4": mxfp4, "nvfp4": nvfp4}[step.method]
    for part in (W, W[:1], W[:2]):
        solution = method.quantize(problem_of(part, step, dtype=dtype), step)
        result = solution.encoded.dequantize(torch.float32)
        assert torch.isfinite(result).all()
        assert (result[0] == 0).all()


def outliers(count: int = 512, columns: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(count, columns, generator=generator)
    X[:, ::32] *= 60
    return X


def test_smoothquant_scales_columns_by_the_paper_s_formula() -> None:
    W, X, step = weights(), outliers(), SmoothQuant(method="smoothquant", alpha=0.7)
    expected = X.abs().amax(dim=0) ** 0.7 / W.abs().amax(dim=0) ** 0.3

    fold = smoothquant.fold(problem_of(W, step, X), step)

    assert fold is not None
    ratio = fold / expected
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))  # a common factor changes nothing


def test_smoothquant_leaves_columns_that_nothing_reached_among_the_others() -> None:
    W, X, step = weights(), outliers(), SmoothQuant(method="smoothquant")
    X[:, 5] = 0

    fold = smoothquant.fold(problem_of(W, step, X), step)

    assert fold is not None
    assert torch.isfinite(fold).all()
    assert fold.min() <= fold[5] <= fold.max()
    assert smoothquant.fold(problem_of(W, step, torch.zeros_like(X)), step) is None


def test_columns_that_come_from_one_output_share_the_scale_of_the_largest() -> None:
    W, X, step = weights(), outliers(), SmoothQuant(method="smoothquant")
    ties = torch.arange(128) // 4
    problem = replace(problem_of(W, step, X), ties=ties)
    expected = (X.abs().amax(dim=0).view(-1, 4).amax(-1) / W.abs().amax(dim=0).view(-1, 4).amax(-1)).sqrt()[ties]

    fold = smoothquant.fold(problem, step)

    assert fold is not None
    ratio = fold / expected
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_smoothing_brings_integers_on_both_sides_nearer_to_the_output(rounding: str) -> None:
    W, X = weights(), outliers()
    step = SmoothQuant.model_validate({"method": "smoothquant", "rounding": rounding})
    fold = smoothquant.fold(problem_of(W, step, X), step)
    assert fold is not None

    def error(scale: Tensor) -> float:
        encoded = smoothquant.quantize(problem_of(W * scale, step, X / scale), step).encoded
        assert isinstance(encoded, Codes)
        output = rounded(X / scale, "int8") @ encoded.dequantize(torch.float32).T
        return float((output - X @ W.T).square().sum())

    assert error(fold) < 0.3 * error(torch.ones_like(fold))
