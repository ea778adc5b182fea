"""The decomposition on matrices of dice: the least that a rank can lose, told beforehand; shared out under a budget."""

import pytest
import torch
from torch import Tensor

from models.prune.factors.ranks import chosen, kept, lost, uniform
from models.prune.factors.spectra import Group
from models.prune.svd import GRADIENT_DAMPING, decomposed, losses_of, prune
from models.quantize.problem import Problem
from models.streaming.statistics import Hessian, Statistics
from models.weights.factored import Factored
from squeeze.errors import SpecInvalid
from squeeze.steps.factoring import SVD, Sides, budget_of, uniform_ranks
from squeeze.steps.schemes import Scheme

OUT, IN, TOKENS = 24, 40, 400


def thrown(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(X: Tensor) -> Statistics:
    statistics = Statistics(("hessian",), X.shape[1], X.device)
    for row in X:  # so few at once that they are summed as they are
        statistics.add(row[None])
    return statistics


def correlated(tokens: int, columns: int) -> Tensor:
    """Inputs most of whose energy lies in few directions."""
    return (thrown(tokens, columns, seed=1) * torch.logspace(0, -3, columns)) @ thrown(columns, columns, seed=2)


def hessian_of(X: Tensor) -> Hessian:
    hessian = seen(X).hessian
    assert hessian is not None
    return hessian


@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT), (OUT, OUT)])
@pytest.mark.parametrize("heights", [None, (), (10,)], ids=["no gradients", "one linear", "two linears"])
def test_what_is_lost_is_the_squares_of_the_singular_values_that_are_dropped(
    shape: tuple[int, int], heights: tuple[int, ...] | None
) -> None:
    W, X, damping = thrown(*shape), correlated(TOKENS, shape[1]), 0.01
    S = None if heights is None else thrown(30, shape[0], seed=5).tensor_split(heights, dim=1)
    found = decomposed(W, hessian_of(X), damping, S)
    H = X.double().T @ X.double() / TOKENS
    H.diagonal().add_(damping * H.diagonal().mean())
    G = torch.eye(shape[0], dtype=torch.float64)
    if S is not None:
        G = torch.block_diag(*(one.double().T @ one.double() for one in S))
        G.diagonal().add_(GRADIENT_DAMPING * G.diagonal().mean())
    A, root = torch.linalg.cholesky(G), torch.linalg.cholesky(H)
    values = torch.linalg.svdvals(A.T @ W.double() @ root)
    torch.testing.assert_close(found.losses, values.square(), rtol=1e-5, atol=1e-6 * float(values[0] ** 2))
    torch.testing.assert_close(losses_of(W, hessian_of(X), damping, S), found.losses)
    torch.testing.assert_close(found.left @ found.right, W.double(), rtol=0, atol=1e-5)
    for rank in (1, 7, 16):
        difference = W.double() - found.left[:, :rank] @ found.right[:rank]
        loss = float((difference.T @ G @ difference * H).sum())
        assert loss == pytest.approx(float(values[rank:].square().sum()), rel=1e-4)


def test_weighing_by_inputs_beats_the_plain_decomposition_where_they_are_correlated() -> None:
    W, X, rank = thrown(OUT, IN), correlated(TOKENS, IN), 8
    U, s, V = torch.linalg.svd(W, full_matrices=False)
    plain = (U[:, :rank] * s[:rank]) @ V[:rank]
    found = decomposed(W, hessian_of(X), 1e-6, None)
    weighed = (found.left[:, :rank] @ found.right[:rank]).float()
    errors = [float((X @ (W - one).T).square().sum()) for one in (plain, weighed)]
    assert errors[1] < 0.05 * errors[0]


def test_an_input_that_was_never_active_is_kept_as_the_outputs_are() -> None:
    W, X = thrown(OUT, IN), correlated(TOKENS, IN)
    X[:, 3] = 0
    for weight in (W, W.T.contiguous()[:, :OUT]):
        found = decomposed(weight, hessian_of(X[:, : weight.shape[1]]), 0.01, None)
        restored = found.left[:, :20] @ found.right[:20]
        assert bool(torch.isfinite(restored).all()) and float(restored[:, 3].norm()) > 0.3 * float(weight[:, 3].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_factors_are_of_the_model_s_type_and_of_one_size(dtype: torch.dtype) -> None:
    W, X = 1e-3 * thrown(OUT, IN), 100 * correlated(TOKENS, IN)
    scheme = Scheme("factored", 16, "channel", rank=8, basis="a")
    problem = Problem(W, seen(X), scheme, dtype, ("a", "b"), (OUT // 2, OUT // 2))
    solution = prune(problem, SVD(method="svd", params_target=0.5))
    factors = solution.encoded
    assert isinstance(factors, Factored) and factors.left.dtype == factors.right.dtype == dtype
    assert factors.left.shape == (OUT, 8) and factors.right.shape == (8, IN) and solution.escalations == 0
    torch.testing.assert_close(factors.left.float().norm(dim=0), factors.right.float().norm(dim=1), rtol=2e-2, atol=0)
    whole = factors.dequantize(torch.float32)
    assert torch.equal(whole, (factors.left.float() @ factors.right.float()).to(dtype).float())
    assert torch.equal(factors.rows(3, 9).dequantize(torch.float32), whole[3:9])
    divided = factors.divided(torch.full((OUT,), 2.0), dtype).dequantize(torch.float32)
    torch.testing.assert_close(divided, whole / 2, rtol=1e-2, atol=1e-6)


def test_what_layers_before_it_changed_is_made_up_for() -> None:
    W, before = thrown(OUT, IN), correlated(TOKENS, IN)
    now = before + 0.3 * before.roll(1, dims=1)
    statistics = Statistics(("hessian", "drift"), IN, before.device)
    for each, other in zip(now, before, strict=True):
        statistics.add(each[None, None], other[None, None])
    scheme, step = Scheme("factored", 32, "channel", rank=20, basis="a"), SVD(method="svd", params_target=0.5)
    errors = []
    for told in (seen(now), statistics):
        made = prune(Problem(W.clone(), told, scheme, torch.float32, ("a",), (OUT,)), step).encoded
        errors.append(float((now @ made.dequantize(torch.float32).T - before @ W.T).square().sum()))
    assert errors[1] < 0.3 * errors[0], errors


SIDES = {"a": Sides(64, 64), "b": Sides(64, 64), "c": Sides(128, 64), "d": Sides(16, 8)}
WHOLE = 20_000
STEP = SVD(method="svd", params_target=0.7)


def falling(count: int, scale: float, rate: float) -> tuple[float, ...]:
    values = scale * rate ** torch.arange(count, dtype=torch.float64)
    return tuple(torch.cat([values.flip(0).cumsum(0).flip(0), torch.zeros(1).double()])[::8].tolist())


GROUPS = [
    Group(("a", "b"), (falling(64, 1, 0.9), falling(64, 5, 0.95)), falling(64, 5, 0.9)),
    Group(("c",), (falling(64, 1, 0.8),), ()),
    Group(("d",), ((),), ()),
]


def test_the_budget_is_met_but_for_less_than_one_step_and_no_other_choice_loses_less() -> None:
    cuts = chosen(STEP, WHOLE, SIDES, GROUPS)
    budget = budget_of(STEP, WHOLE, SIDES)
    assert 0 <= budget - kept(cuts, SIDES) < 8 * (64 + 128)
    assert list(cuts) == list(SIDES) and all(cut.rank is None or cut.rank % 8 == 0 for cut in cuts.values())
    gone, whole = lost(STEP, cuts, GROUPS)
    even = uniform(STEP, WHOLE, SIDES)
    assert 0 < gone < 0.8 * lost(STEP, even, GROUPS)[0] < whole
    assert cuts["d"] == even["d"], "nobody knows what it would lose"
    less = chosen(SVD(method="svd", params_target=0.5), WHOLE, SIDES, GROUPS)
    assert less["a"].basis == less["b"].basis == "a", "linears with one input share a factor where that loses less"


def test_what_no_rank_makes_smaller_stays_as_it_is() -> None:
    groups = [Group(("a",), (tuple([1e9] * 8 + [0.0]),), ()), *GROUPS[1:2], Group(("b",), (falling(64, 1, 0.5),), ())]
    cuts = chosen(STEP, WHOLE, SIDES, groups)
    assert cuts["a"].rank is None and cuts["b"].rank is not None
    assert kept(cuts, SIDES) <= budget_of(STEP, WHOLE, SIDES)


def test_even_shares_are_as_large_as_the_budget_allows() -> None:
    budget = budget_of(STEP, WHOLE, SIDES)
    ranks = uniform_ranks(STEP, budget, SIDES)
    used = sum(one.kept(ranks[name]) for name, one in SIDES.items())
    assert 0 <= budget - used < 2 * 8 * (64 + 64) and ranks["a"] == ranks["b"], "which change together"


def test_a_share_that_the_smallest_ranks_do_not_meet_is_refused_with_the_least_that_could_be() -> None:
    with pytest.raises(SpecInvalid, match=r"the least that params_target can be is 0\.36$") as refused:
        budget_of(SVD(method="svd", params_target=0.1), WHOLE, SIDES)
    assert refused.value.param == "params_target"
    least = float(str(refused.value).rpartition(" ")[2])
    assert budget_of(SVD(method="svd", params_target=least), WHOLE, SIDES) > 0
