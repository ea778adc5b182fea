"""The methods against the papers' formulas, written out element by element."""

import random
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from models.merge.ties import thresholds
from models.merge.vectors import Part, Vectors
from squeeze.steps.merging import DARE, TIES, Linear, MagMax, Merge

N, K, PART = 3, 2000, 300


def vectors_of(T: Tensor, weights: list[float] | None = None) -> Vectors:
    def walk() -> Iterator[Tensor]:
        for part in torch.split(T, PART, dim=1):
            yield part.clone()

    n = len(T)
    return Vectors(torch.tensor(weights or [1.0] * n), T.shape[1], walk, tuple(range(n)))


def merged(step: Merge, T: Tensor, weights: list[float] | None = None) -> Part:
    parts = list(import_module(f"models.merge.{step.method}").merge(step, vectors_of(T, weights)))
    joined = {name: torch.cat([getattr(one, name) for one in parts], dim=-1) for name in vars(parts[0])}
    return Part(**joined)


def made(method: type[Merge], **fields: Any) -> Merge:
    name = method.__name__.lower()
    return method.model_validate({"method": name, "models": ["org/a", "org/b", "org/c"]} | fields)


@pytest.fixture
def T() -> Tensor:  # noqa: N802 - the papers' letter
    dice = torch.Generator().manual_seed(3)
    T = torch.randn(N, K, generator=dice) * torch.rand(N, 1, generator=dice)
    return T * (torch.rand(N, K, generator=dice) < 0.8)


def test_linear_adds_up_what_is_weighted(T: Tensor) -> None:
    weights = [0.5, -0.25, 0.75]
    expected = [sum(w * float(t) for w, t in zip(weights, column, strict=True)) for column in T.t()]
    assert torch.allclose(merged(made(Linear), T, weights).merged, torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 1.0, 0.5]], ids=["alike", "weighted"])
def test_ties_trims_elects_and_averages_those_that_agree(T: Tensor, density: float, weights: list[float]) -> None:
    count = round(density * K)
    trimmed = []
    for row in T.tolist():
        largest = sorted(range(K), key=lambda j: -abs(row[j]))[:count]  # no two are of one size but the zeros
        trimmed.append([row[j] if j in set(largest) else 0.0 for j in range(K)])
    expected = []
    for column in zip(*trimmed, strict=True):
        total = sum(w * t for w, t in zip(weights, column, strict=True))
        agreeing = [(w, t) for w, t in zip(weights, column, strict=True) if t * total > 0]
        mass = sum(w for w, _ in agreeing)
        expected.append(sum(w * t for w, t in agreeing) / mass if agreeing else 0.0)
    found = merged(made(TIES, density=density), T, weights)
    assert torch.equal(found.kept, torch.tensor(trimmed))
    assert torch.allclose(found.merged, torch.tensor(expected), atol=1e-6)
    assert int(found.used.sum()) == sum(
        t * sum(w * other for w, other in zip(weights, column, strict=True)) > 0
        for column in zip(*trimmed, strict=True)
        for t in column
    )


def test_a_threshold_is_the_magnitude_that_a_sort_finds(T: Tensor) -> None:
    T[0, :50] = 0.25  # ties
    T[1] = 0.0
    for count in (1, 2, 40, 1999, 2000):
        expected = T.abs().sort(dim=1, descending=True).values[:, count - 1]
        assert torch.equal(thresholds(vectors_of(T), count), expected)


def test_dare_drops_its_share_and_keeps_the_mean(T: Tensor) -> None:
    T = torch.randn(N, 200_000, generator=torch.Generator().manual_seed(5))
    found = merged(made(DARE, drop=0.75), T, [0.5, 0.25, 0.25])
    stays = found.kept != 0
    assert float(stays.float().mean()) == pytest.approx(0.25, abs=0.002)
    assert torch.allclose(found.kept[stays], 4 * T[stays])
    expected = 0.5 * found.kept[0] + 0.25 * found.kept[1] + 0.25 * found.kept[2]
    assert torch.allclose(found.merged, expected, atol=1e-6)
    assert float((stays[0] & stays[1]).float().mean()) == pytest.approx(0.0625, abs=0.002)  # each has draws of its own
    assert torch.equal(merged(made(DARE, drop=0.0), T).merged, T.sum(dim=0))


def test_magmax_takes_the_largest_whatever_its_sign(T: Tensor) -> None:
    expected = [max(column, key=abs) for column in T.t().tolist()]
    found = merged(made(MagMax), T)
    assert found.merged.tolist() == pytest.approx(expected)
    assert int(found.used.sum()) == sum(one != 0 for one in expected)


def test_weights_of_an_average_are_divided_by_their_sum() -> None:
    entries = [{"model": "org/a", "weight": 3.0}, {"model": "org/b"}]
    assert made(Linear, models=entries).weights == (0.75, 0.25)
    assert made(Linear, models=entries, normalize=False).weights == (3.0, 1.0)
    assert made(DARE, models=entries).weights == (0.75, 0.25)
    assert made(TIES, models=entries).weights == (3.0, 1.0)


def test_one_model_of_two_equal_ones_changes_nothing_of_ties_but_conflicts_do() -> None:
    rows = [[random.Random(1).gauss(0, 1) for _ in range(K)]] * 2
    T = torch.tensor(rows)
    assert torch.allclose(merged(made(TIES, density=1.0), T).merged, T[0])
    assert not merged(made(TIES, density=1.0), torch.stack([T[0], -T[0]])).merged.any()
