"""The multiple-choice knapsack, solved exactly: one option for every item, least loss within a budget.

States are pairs of cost and loss that no other pair betters in both; an item's options are added to all of them at
once. What even the linear relaxation of the items to come can't bring below the best known answer is dropped
(Pisinger, A minimal algorithm for the multiple-choice knapsack problem, 1995, has both ideas), so that few states
live however large the budget is. Costs are whole numbers and never rounded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
SLACK = 1e-9  # relative; far more than sums of the same losses in another order differ by


@dataclass(frozen=True)
class Option:
    cost: int
    loss: float


def solve(items: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """The option of each item, by its place, with the least sum of losses at a sum of costs ≤ budget.

    Losses are finite and not negative. None: even the cheapest options cost more than the budget.
    """
    useful = [_undominated(options) for options in items]
    least = [options[0][1].cost for options in useful]
    unit = math.gcd(*(option.cost - base for options, base in zip(useful, least, strict=True) for _, option in options))
    room = budget - sum(least)
    if room < 0:
        return None
    room = room // unit if unit else 0
    costs = [
        np.array([(one.cost - base) // max(unit, 1) for _, one in options])
        for options, base in zip(useful, least, strict=True)
    ]
    losses = [np.array([one.loss for _, one in options]) for options in useful]
    relaxed = [_Relaxation(costs[n:], losses[n:]) for n in range(len(items) + 1)]
    best = relaxed[0].rounded(room)
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[Integers, Integers]] = []  # of each item: the state that a state came from, the option taken
    for n in range(len(items)):
        best = min(best, *(lost + relaxed[n].rounded(room - spent) for spent, lost in _few(cost, loss)))
        options = len(costs[n])
        wide_cost = (cost[:, None] + costs[n]).ravel()
        wide_loss = (loss[:, None] + losses[n]).ravel()
        fits = wide_cost <= room
        promised = wide_loss[fits] + relaxed[n + 1].bound(room - wide_cost[fits])
        fits[fits] = promised <= best * (1 + SLACK)
        places = np.flatnonzero(fits)
        order = places[np.lexsort((wide_loss[places], wide_cost[places]))]
        ordered = wide_loss[order]
        before = np.minimum.accumulate(np.concatenate(([np.inf], ordered[:-1])))
        order = order[ordered < before]
        cost, loss = wide_cost[order], wide_loss[order]
        steps.append((order // options, order % options))
    state = int(np.argmin(loss))
    chosen = [0] * len(items)
    for n in reversed(range(len(items))):
        origins, taken = steps[n]
        chosen[n] = useful[n][int(taken[state])][0]
        state = int(origins[state])
    return chosen


def _undominated(options: Sequence[Option]) -> list[tuple[int, Option]]:
    """Options in order of rising cost and falling loss, with their places."""
    kept: list[tuple[int, Option]] = []
    for place, option in sorted(enumerate(options), key=lambda one: (one[1].cost, one[1].loss)):
        if not kept or option.loss < kept[-1][1].loss:
            kept.append((place, option))
    return kept


class _Relaxation:
    """Some items when fractions of options may be taken: the lower convex hulls of their options, steepest first."""

    def __init__(self, costs: Sequence[Integers], losses: Sequence[Floats]) -> None:
        gains: list[tuple[float, int, float]] = []  # slope, cost, change of loss of one step along a hull
        for cost, loss in zip(costs, losses, strict=True):
            hull = _hull(cost, loss)
            for a, b in pairwise(hull):
                width, drop = int(cost[b] - cost[a]), float(loss[b] - loss[a])
                gains.append((drop / width, width, drop))
        gains.sort()
        self._cost = np.cumsum([0, *(width for _, width, _ in gains)])
        # Summed from the small end: what is left after large drops would be lost among their roundings.
        least = sum(float(loss[-1]) for loss in losses)
        self._loss = np.cumsum([least, *(-drop for _, _, drop in reversed(gains))])[::-1]

    def bound(self, room: Integers) -> Floats:
        """The least loss at most so much cost, fractions allowed."""
        bound: Floats = np.interp(room, self._cost, self._loss)
        return bound

    def rounded(self, room: int) -> float:
        """The loss of whole steps alone, as many as fit: what can be had."""
        return float(self._loss[np.searchsorted(self._cost, room, side="right") - 1])


def _hull(cost: Integers, loss: Floats) -> list[int]:
    hull: list[int] = []
    for n in range(len(cost)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (loss[b] - loss[a]) * (cost[n] - cost[a]) < (loss[n] - loss[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(n)
    return hull


def _few(cost: Integers, loss: Floats) -> list[tuple[int, float]]:
    """Some states, spread over all: each may lead to a better answer than the one that is known."""
    places = np.unique(np.linspace(0, len(cost) - 1, 16).astype(np.int64))
    return [(int(cost[place]), float(loss[place])) for place in places]
