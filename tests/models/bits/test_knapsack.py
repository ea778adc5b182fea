"""The knapsack's answers against every possible choice, and at the size of a large model."""

import itertools
import random

import pytest

from models.bits.knapsack import Option, solve


def value(items: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [options[place] for options, place in zip(items, chosen, strict=True)]
    return sum(one.cost for one in taken), sum(one.loss for one in taken)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_within_the_budget_loses_less(seed: int) -> None:
    dice = random.Random(seed)
    items = [
        [
            Option(dice.randint(1, 60), dice.choice([dice.random(), dice.randint(0, 3)]))
            for _ in range(dice.randint(1, 4))
        ]
        for _ in range(dice.randint(1, 7))
    ]
    budget = dice.randint(5, 250)
    every = [value(items, chosen) for chosen in itertools.product(*(range(len(options)) for options in items))]
    within = [loss for cost, loss in every if cost <= budget]
    chosen = solve(items, budget)
    if not within:
        assert chosen is None
        return
    assert chosen is not None
    cost, loss = value(items, chosen)
    assert cost <= budget
    assert loss == pytest.approx(min(within), abs=1e-12)


def test_layers_of_a_large_model_with_odd_sizes_are_allotted_exactly() -> None:
    """320 groups of four candidates, without a common factor that would make the budget small; checked by a bound."""
    dice = random.Random(0)
    sizes = [dice.randint(10**6, 10**8) for _ in range(320)]
    items = [[Option(size * bits, dice.uniform(0.5, 2) * size * 4.0**-bits) for bits in (2, 3, 4, 8)] for size in sizes]
    budget = int(3.5 * sum(sizes))
    chosen = solve(items, budget)
    assert chosen is not None
    cost, loss = value(items, chosen)
    assert cost <= budget
    price = max(  # Lagrange: for every price of a bit, no choice within the budget can lose less than this
        sum(min(one.loss + price * one.cost for one in options) for options in items) - price * budget
        for price in (10.0**-n * step for n in range(1, 8) for step in (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
    )
    assert price <= loss <= price * 1.05


def test_a_budget_that_is_just_the_cheapest_choice_is_enough() -> None:
    items = [[Option(3, 1.0), Option(2, 2.0)], [Option(5, 0.0)]]
    assert solve(items, 7) == [1, 0]
    assert solve(items, 6) is None
    assert solve(items, 10**18) == [0, 0]
