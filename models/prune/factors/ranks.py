"""One budget of parameters shared out as ranks among all linears: those singular values go that lose least for each.

Of linears that read one input either each has its own two factors, or all share the second, whichever loses less at
its price. Of what lies on the lower convex hull of price and loss the steepest steps are taken first: with hundreds of
ranks for each layer that is the best choice but for less than one step. What then is left of the budget is filled up.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from models.prune.factors.spectra import Group
from squeeze.steps.factoring import SVD, Sides, budget_of, uniform_ranks


@dataclass(frozen=True)
class Cut:
    """Linears and what becomes of them. rank: None: they stay as they are. basis: under whose name the second factor
    is kept; that of several linears is shared.
    """

    rank: int | None
    basis: str


@dataclass(frozen=True)
class _Way:
    """One way to write a group. ranks: of each linear; together: one rank for all."""

    price: int
    loss: float
    ranks: tuple[int | None, ...]
    together: bool = False


def uniform(step: SVD, parameters: int, sides: Mapping[str, Sides]) -> dict[str, Cut]:
    """Every linear keeps the same share. Raises as `budget_of`."""
    ranks = uniform_ranks(step, budget_of(step, parameters, sides), sides)
    return {name: Cut(rank, name) for name, rank in ranks.items()}


def chosen(step: SVD, parameters: int, sides: Mapping[str, Sides], groups: Iterable[Group]) -> dict[str, Cut]:
    """What loses least within the budget. Linears of which nobody knows what they lose keep their even share.

    parameters: of the whole model. sides: of all these linears, in the model's order. Raises as `budget_of`.
    """
    even = uniform(step, parameters, sides)
    known = [group for group in groups if all(group.losses)]
    apart = set(sides).difference(*(group.names for group in known))
    budget = budget_of(step, parameters, sides) - sum(sides[name].kept(even[name].rank) for name in apart)
    ways = [_ways(step, group, sides) for group in known]
    cuts = {name: even[name] for name in apart}
    for group, way in zip(known, _filled(ways, _steepest([_hull(each) for each in ways], budget), budget), strict=True):
        ranks = way.ranks * len(group.names) if way.together else way.ranks
        for name, rank in zip(group.names, ranks, strict=True):
            cuts[name] = Cut(rank, group.names[0] if way.together else name)
    return {name: cuts[name] for name in sides}


def kept(cuts: Mapping[str, Cut], sides: Mapping[str, Sides]) -> int:
    """Parameters of all linears together; a shared factor counts once."""
    shared = {cut.basis: cut.rank * sides[name].columns for name, cut in cuts.items() if cut.rank is not None}
    own = sum(sides[name].whole if cut.rank is None else cut.rank * sides[name].rows for name, cut in cuts.items())
    return own + sum(shared.values())


def lost(step: SVD, cuts: Mapping[str, Cut], groups: Iterable[Group]) -> tuple[float, float]:
    """(what the choice loses, what would be lost with all of these linears left out), where that is known."""
    gone = whole = 0.0
    for group in groups:
        if not all(group.losses):
            continue
        whole += sum(losses[0] for losses in group.losses)
        first = cuts[group.names[0]]
        if len(group.names) > 1 and first.rank is not None and cuts[group.names[1]].basis == first.basis:
            gone += group.together[first.rank // step.rank_multiple]
            continue
        for name, losses in zip(group.names, group.losses, strict=True):
            rank = cuts[name].rank
            gone += 0.0 if rank is None else losses[rank // step.rank_multiple]
    return gone, whole


def _ways(step: SVD, group: Group, sides: Mapping[str, Sides]) -> list[_Way]:
    own = [sides[name] for name in group.names]
    ways = _side_by_side(
        [_hull(_alone(step, losses, one)) for losses, one in zip(group.losses, own, strict=True)],
    )
    if group.together:
        joined = Sides(sum(one.rows for one in own), own[0].columns)
        ways += [
            _Way(way.price, way.loss, way.ranks, together=True)
            for way in _alone(step, group.together, joined)
            if way.ranks[0] is not None
        ]
    return ways


def _alone(step: SVD, losses: Sequence[float], sides: Sides) -> list[_Way]:
    """Every rank that saves something, and the linear as it is."""
    ways = [_Way(sides.whole, 0.0, (None,))]
    for number in range(1, len(losses)):
        rank = number * step.rank_multiple
        if sides.factored(rank) < sides.whole:
            ways.append(_Way(sides.factored(rank), losses[number], (rank,)))
    return ways


def _side_by_side(hulls: Sequence[Sequence[_Way]]) -> list[_Way]:
    """The best of several linears at every price: one more step at a time, the steepest first."""
    places = [0] * len(hulls)
    steps = sorted(
        (_slope(before, after), which, place + 1)
        for which, hull in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(hull))
    )
    ways = [_joined(hulls, places)]
    for _, which, place in steps:
        places[which] = place
        ways.append(_joined(hulls, places))
    return ways


def _joined(hulls: Sequence[Sequence[_Way]], places: Sequence[int]) -> _Way:
    each = [hull[place] for hull, place in zip(hulls, places, strict=True)]
    return _Way(sum(one.price for one in each), sum(one.loss for one in each), tuple(one.ranks[0] for one in each))


def _steepest(hulls: Sequence[Sequence[_Way]], budget: int) -> list[_Way]:
    """One way of each hull. What no longer fits is passed over, and what is less steep may still."""
    places = [0] * len(hulls)
    left = budget - sum(hull[0].price for hull in hulls)
    steps = sorted(
        (_slope(before, after), which, place, after.price - before.price)
        for which, hull in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(hull))
    )
    for _, which, place, price in steps:
        if places[which] == place and price <= left:
            places[which], left = place + 1, left - price
    return [hull[place] for hull, place in zip(hulls, places, strict=True)]


def _filled(ways: Sequence[Sequence[_Way]], taken: Sequence[_Way], budget: int) -> list[_Way]:
    """The same with what is left of the budget spent on ways off the hulls, the most gainful first."""
    chosen = list(taken)
    while True:
        left = budget - sum(way.price for way in chosen)
        gains = [
            (other.loss - way.loss, which, other)
            for which, way in enumerate(chosen)
            for other in ways[which]
            if other.loss < way.loss and other.price <= way.price + left
        ]
        if not gains:
            return chosen
        _, which, other = min(gains, key=lambda gain: gain[:2])
        chosen[which] = other


def _hull(ways: Iterable[_Way]) -> list[_Way]:
    """Of rising price and falling loss, ever less steeply."""
    hull: list[_Way] = []
    for way in sorted(ways, key=lambda one: (one.price, one.loss)):
        if hull and way.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], way):
            hull.pop()
        hull.append(way)
    return hull


def _slope(before: _Way, after: _Way) -> float:
    return (after.loss - before.loss) / (after.price - before.price)
