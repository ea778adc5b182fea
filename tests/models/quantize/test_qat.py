"""Rounded weights that learn: their gradient against autograd's, where they start, where their codes stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.quantize import gptq, qat, rtn
from models.quantize.problem import Problem
from models.quantize.qat import Learner
from models.streaming.statistics import Statistics
from models.weights.codes import Codes
from squeeze.steps.quantization import GPTQ, QAT, RTN
from squeeze.steps.schemes import Scheme

ROWS, COLUMNS, GROUP = 12, 64, 32
BOTH = pytest.mark.parametrize("symmetric", [True, False])
EITHER = pytest.mark.parametrize("train", ["scales", "weights"])


class Straight(torch.autograd.Function):
    """Rounds, and passes gradients on as if it had not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def begun(symmetric: bool, bits: int = 3) -> Codes:
    """What rounding to nearest makes of random weights."""
    problem = Problem(random(ROWS, COLUMNS) * 0.1, None, Scheme("int", bits, GROUP, symmetric), torch.float32)
    encoded = qat.quantize(problem, QAT(method="qat", start="rtn")).encoded
    assert isinstance(encoded, Codes)
    return encoded


def learner(train: str, symmetric: bool, bias: nn.Parameter | None = None, bits: int = 3) -> Learner:
    return Learner(begun(symmetric, bits), bias, torch.float32, torch.float32, weights=train == "weights")


@EITHER
@BOTH
def test_it_starts_as_the_codes_that_it_is_given(train: str, symmetric: bool) -> None:
    codes = begun(symmetric)
    for name, tensor in learner(train, symmetric).learned().tensors().items():
        assert torch.equal(tensor, codes.tensors()[name])


@EITHER
@BOTH
def test_its_gradients_are_those_that_autograd_finds(train: str, symmetric: bool) -> None:
    one = learner(train, symmetric)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(random(*parameter.shape, seed=2))  # so that some weights are past the ends
    x, g = random(2, 5, COLUMNS, seed=3).requires_grad_(), random(2, 5, ROWS, seed=4)
    torch.autograd.backward((one(x) * g).sum())

    y = x.detach().clone().requires_grad_()
    leaves = [parameter.detach().clone().requires_grad_() for parameter in one.parameters()]
    zero = one.zero.unsqueeze(-1)
    if train == "scales":
        codes = one.codes - zero
    else:
        codes = Straight.apply(leaves[1] * qat.WEIGHT_RATE).clamp(-zero, 7 - zero)  # type: ignore[no-untyped-call]
    raw = one.start * (1 + leaves[0] / 4)
    scale = raw + (raw.half().float() - raw).detach()
    torch.autograd.backward((F.linear(y, (codes * scale.unsqueeze(-1)).view(ROWS, COLUMNS)) * g).sum())
    torch.testing.assert_close(x.grad, y.grad)
    for parameter, leaf in zip(one.parameters(), leaves, strict=True):
        torch.testing.assert_close(parameter.grad, leaf.grad, rtol=1e-4, atol=1e-4)


@EITHER
@BOTH
@pytest.mark.parametrize("bits", [2, 8])
def test_whatever_it_learns_its_codes_and_scales_are_what_formats_hold(train: str, symmetric: bool, bits: int) -> None:
    one, top = learner(train, symmetric, bits=bits), 2**bits - 1
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(3 * random(*parameter.shape))
    codes = one.learned()
    assert codes.codes.dtype == codes.zero.dtype == torch.uint8
    assert int(codes.codes.max()) <= top and 1 <= int(codes.zero.min()) <= int(codes.zero.max()) <= top
    assert torch.equal(codes.scale.sign(), one.start.sign()) and torch.equal(codes.scale.half().float(), codes.scale)
    assert torch.equal(codes.dequantize(torch.float32), one.weight)


def test_inputs_of_any_shape_go_through_an_expert_s_of_no_token_too() -> None:
    bias = nn.Parameter(random(ROWS, seed=5), requires_grad=False)
    one = learner("weights", symmetric=True, bias=bias)
    for shape in ((0, COLUMNS), (3, COLUMNS), (2, 3, COLUMNS)):
        x = random(*shape).requires_grad_()
        y = one(x)
        torch.testing.assert_close(y, F.linear(x, one.weight, bias))
        torch.autograd.backward(y.sum())
        assert x.grad is not None
    assert one.shift.grad is not None and bias.grad is None


@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_it_starts_from_what_the_other_method_makes(start: str) -> None:
    W, scheme = random(ROWS, COLUMNS), Scheme("int", 2, GROUP)
    statistics = Statistics(frozenset({"hessian"}), COLUMNS, torch.device("cpu"))
    statistics.add(random(256, COLUMNS, seed=1))
    step = QAT.model_validate({"method": "qat", "start": start, "bits": 2, "group_size": 32})
    assert isinstance(step.begun, GPTQ if start == "gptq" else RTN) and step.begun.bits == 2
    assert step.wanted() == step.begun.wanted() and step.needs_calibration
    begun = step.begun

    def problem() -> Problem:
        return Problem(W.clone(), statistics, scheme, torch.float32)

    expected = (
        gptq.quantize(problem(), begun) if isinstance(begun, GPTQ) else rtn.quantize(problem(), RTN(method="rtn"))
    )
    found = qat.quantize(problem(), step).encoded.tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.encoded.tensors().items())
