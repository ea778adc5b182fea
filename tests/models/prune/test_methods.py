"""Which weights become zero, and what the others become, against references written the plain way in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.prune import magnitude, sparsegpt, wanda
from models.prune.zeroing.masks import lowest
from models.quantize import gptq, rtn
from models.quantize.problem import Problem
from models.streaming.statistics import Hessian, Statistics
from squeeze.steps.quantization import GPTQ, RTN
from squeeze.steps.sparsifying import Magnitude, SparseGPT, Sparsify, Wanda
from tests.models.quantize.test_quantize import CPU, correlated

PATTERNS = [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": "2:4"}, {"pattern": "4:8"}]
KINDS: list[tuple[Any, type[Sparsify]]] = [(magnitude, Magnitude), (wanda, Wanda), (sparsegpt, SparseGPT)]


def statistics_of(X: Tensor) -> Statistics:
    """Of products in float32: few tokens at a time are not rounded."""
    statistics = Statistics({"hessian", "moments"}, X.shape[1], CPU)
    for few in X.split(63):
        statistics.add(few)
    return statistics


def pruned(method: Any, W: Tensor, X: Tensor, step: Sparsify, heights: tuple[int, ...] = ()) -> Tensor:
    problem = Problem(W.clone(), statistics_of(X), step.scheme(), torch.float32, heights=heights)
    result: Tensor = method.prune(problem, step).encoded.dequantize(torch.float32)
    return result


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def zeros_of(weight: Tensor, group: tuple[int, int] | None) -> set[int]:
    """How many zeros there are among the neighbours of a pattern, or in all."""
    neighbours = weight.numel() if group is None else group[1]
    return set((weight.reshape(-1, neighbours) == 0).sum(dim=1).tolist())


def plain_sparsegpt(W: Tensor, X: Tensor, step: SparseGPT) -> Tensor:
    """The paper's algorithm with the inverse itself, in float64, as its authors' code compares weights; but each block
    loses as many as it would if all of the layer were compared beforehand.
    """
    W, X = W.double().clone(), X.double()
    H = X.T @ X
    H += step.damping * H.diagonal().mean() * torch.eye(len(H))
    inverse = torch.linalg.inv(H)
    upper = torch.linalg.cholesky(inverse, upper=True)  # whose squared diagonal is that of the later columns' inverse
    gone = torch.zeros(W.shape, dtype=torch.bool)
    unit = step.group[1] if step.group else 128
    whole = W**2 / upper.diagonal() ** 2
    due = whole <= whole.flatten().sort().values[round(whole.numel() * step.sparsity) - 1]
    for i in range(W.shape[1]):
        if i % unit == 0:
            few = slice(i, min(i + unit, W.shape[1]))
            scores = W[:, few] ** 2 / upper.diagonal()[few] ** 2
            if step.group:
                order = scores.argsort(dim=1)[:, : step.group[0]]
                gone[:, few] = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, order, True)
            else:
                last = scores.flatten().sort().values[int(due[:, few].sum()) - 1]
                gone[:, few] = scores <= last
        kept = torch.where(gone[:, i], 0.0, W[:, i])
        error = (W[:, i] - kept) / upper[i, i]
        W[:, i:] -= error[:, None] * upper[i, i:]
        W[:, i] = kept
    return W


@pytest.mark.parametrize("wanted", PATTERNS)
@pytest.mark.parametrize(("method", "step"), KINDS)
def test_as_many_weights_go_as_were_asked_for(method: Any, step: type[Sparsify], wanted: dict[str, Any]) -> None:
    asked = step.model_validate({"method": step.__name__.lower()} | wanted)
    result = pruned(method, weights(40, 256), correlated(300, 256, 0), asked)
    count = int((result == 0).sum())
    assert abs(count - asked.sparsity * result.numel()) <= (20 if method is wanda else 1)
    if asked.group is not None:
        assert zeros_of(result, asked.group) == {asked.group[0]}


@pytest.mark.parametrize("wanted", PATTERNS)
def test_sparsegpt_gives_the_weights_of_the_paper_s_algorithm(wanted: dict[str, Any]) -> None:
    W, X = weights(24, 320), correlated(900, 320, 1)
    step = SparseGPT.model_validate({"method": "sparsegpt"} | wanted)
    ours, expected = pruned(sparsegpt, W, X, step), plain_sparsegpt(W, X, step)
    # Scores that are nearly equal may fall either way in float32, and what follows then differs in that row.
    assert ((ours == 0) == (expected == 0)).float().mean() > 0.995
    error = ((ours.double() - expected) @ X.double().T).square().sum() / (expected @ X.double().T).square().sum()
    assert error < 1e-3


def test_of_linears_with_one_input_each_loses_its_own_share() -> None:
    W, X = torch.cat([weights(16, 128), 10 * weights(8, 128, 1)]), correlated(300, 128, 2)
    for method, kind in KINDS:
        step = kind.model_validate({"method": kind.__name__.lower(), "sparsity": 0.25})
        for part in pruned(method, W, X, step, (16, 8)).split([16, 8]):
            assert (part == 0).float().mean() == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("wanted", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_what_looks_at_the_inputs_changes_the_outputs_less(wanted: dict[str, Any]) -> None:
    W, X = weights(64, 256), correlated(1200, 256, 3)
    errors = []
    for method, kind in KINDS:
        result = pruned(method, W, X, kind.model_validate({"method": kind.__name__.lower()} | wanted))
        errors.append(float(((result - W) @ X.T).square().sum()))
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2]


def test_wanda_and_magnitude_leave_the_other_weights_to_the_bit() -> None:
    W, X = weights(16, 64).bfloat16().float(), correlated(100, 64, 4)
    for method, kind in KINDS[:2]:
        result = pruned(method, W, X, kind.model_validate({"method": kind.__name__.lower()}))
        assert torch.equal(result, torch.where(result == 0, 0, W))
    assert pruned(magnitude, W, X, Magnitude(method="magnitude")).abs().max() == W.abs().max()


def test_of_equal_scores_the_first_go() -> None:
    assert lowest(torch.tensor([[1.0, 0.0, 1.0, 1.0, 2.0]]), 3).tolist() == [[True, True, True, False, False]]
    assert not lowest(torch.ones(2, 3), 0).any() and lowest(torch.ones(2, 3), 3).all()


def test_a_column_that_was_never_active_goes_first_by_wanda_and_is_judged_as_a_mean_one_by_sparsegpt() -> None:
    W, X = weights(16, 64), correlated(200, 64, 5)
    X[:, 10:20] = 0
    assert (pruned(wanda, W, X, Wanda(method="wanda"))[:, 10:20] == 0).all()
    result = pruned(sparsegpt, W, X, SparseGPT(method="sparsegpt"))[:, 10:20]
    assert 0 < (result == 0).float().mean() < 1
    assert torch.equal(result, torch.where(result == 0, 0, W[:, 10:20]))


def test_a_linear_that_no_token_came_to_is_judged_by_wanda_by_its_weights_alone() -> None:
    W, step = weights(8, 32), Wanda(method="wanda")
    problem = Problem(W.clone(), Statistics({"moments"}, 32, CPU), step.scheme(), torch.float32)
    solution = wanda.prune(problem, step)
    smallest = W.abs() < W.abs().sort(dim=1).values[:, 16:17]
    assert torch.equal(solution.encoded.dequantize(torch.float32) == 0, smallest) and "no calibration" in str(
        solution.instead
    )


def test_a_hessian_is_factorised_once_for_all_that_read_the_input() -> None:
    statistics = Statistics({"hessian"}, 32, CPU)
    statistics.add(correlated(60, 32, 6))
    step = SparseGPT(method="sparsegpt")
    for _ in range(2):
        sparsegpt.prune(Problem(weights(8, 32), statistics, step.scheme(), torch.float32), step)
    assert isinstance(statistics.hessian, Hessian) and statistics.hessian.factor is not None


@pytest.mark.parametrize("activation_order", [True, False])
def test_gptq_leaves_the_zeros_of_a_pruned_weight_and_makes_the_others_pay(activation_order: bool) -> None:
    W, X = weights(24, 128), correlated(600, 128, 7)
    W = pruned(magnitude, W, X, Magnitude(method="magnitude", pattern="2:4"))
    for symmetric in (True, False):
        step = GPTQ(method="gptq", bits=3, group_size=32, symmetric=symmetric, activation_order=activation_order)
        problem = Problem(W.clone(), statistics_of(X), step.scheme(), torch.float32)
        result = gptq.quantize(problem, step).encoded.dequantize(torch.float32)
        assert (result[W == 0] == 0).all() and (result[W != 0] != 0).any()
        nearest = rtn.quantize(Problem(W.clone(), None, step.scheme(), torch.float32), RTN(method="rtn")).encoded
        errors = [((one - W) @ X.T).square().sum() for one in (result, nearest.dequantize(torch.float32))]
        assert errors[0] < errors[1]
