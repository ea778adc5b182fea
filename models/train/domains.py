"""Domains of the text, each weighed by what the model lost in it: which sequences a step looks at, and how their shares
change (dynamic batch loading, arXiv 2310.06694 section 2.2 and algorithm 1).

What a step looks at follows from the seed and from the looks at the held-out loss before it, whoever asks.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp
from random import Random

import torch
from torch import Tensor

from models.train.examples import Examples
from models.train.packing import Plan, Row, order_of
from squeeze.reports.training import Domain, HeldOutLoss

EVEN_SHARE = 1e-4  # of the weights, that all domains have equal parts of: none is ever out of sight
FEW_TIMES = 4  # that the same text may be seen with hardly less gain than new text (arXiv 2305.16264)


@dataclass(frozen=True)
class Domains:
    """names: by number. rows: the sequences of each. reference: nats a held-out learned token, of the model before
    anything was taken from it. batch_size, seed: of the training.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[Row, ...], ...]
    reference: tuple[float, ...]
    batch_size: int
    seed: int
    _drawn: "_Drawn" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_drawn", _Drawn(len(self.names)))

    @classmethod
    def of(cls, names: Sequence[str], plan: Plan, examples: Examples, reference: Sequence[float]) -> "Domains":
        """plan: of sequences that hold examples of one domain each."""
        assert examples.domains is not None, "they are told apart"
        rows: list[list[Row]] = [[] for _ in names]
        numbers = examples.domains.tolist()
        for row in plan.rows:
            rows[numbers[row[0]]].append(row)
        return cls(tuple(names), tuple(map(tuple, rows)), tuple(reference), plan.batch_size, plan.seed)

    @property
    def shares(self) -> dict[str, float]:
        """Of the sequences: what domains weigh as the training begins, so that none is seen more often than others."""
        whole = sum(map(len, self.rows))
        return {name: len(rows) / whole for name, rows in zip(self.names, self.rows, strict=True)}

    def look(
        self, step: int, examples: Examples, losses: tuple[Tensor, Tensor], before: Sequence[HeldOutLoss]
    ) -> HeldOutLoss:
        """What is told of a look at the held-out losses after so many steps, with what domains weigh from there on.

        losses: (examples,) sums of nats, and numbers of learned tokens. before: the looks so far.
        """
        found = self.losses(examples, losses)
        weights = self.shares
        if before and before[-1].domain_weights is not None:
            weights = self.weighed(before[-1].domain_weights, found)
        loss = float(losses[0].sum() / losses[1].sum())
        return HeldOutLoss(step=step, loss=loss, domain_losses=found, domain_weights=weights)

    def losses(self, examples: Examples, losses: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Means over the learned tokens of each domain. losses: of the examples, as `look` has them."""
        sums, counts = (_by_domain(examples, one, len(self.names)) for one in losses)
        return dict(zip(self.names, (sums / counts).tolist(), strict=True))

    def weighed(self, weights: Mapping[str, float], losses: Mapping[str, float]) -> dict[str, float]:
        """Weights after a look: each times exp(max(loss − reference, 0)), divided by their sum.

        Source: arXiv 2310.06694, algorithm 1; there the reference losses are those that a scaling law predicts for a
        model of the smaller size, here those of the model that was made smaller. As the authors' code has it, every
        domain keeps a small share (from DoReMi, arXiv 2305.10429).
        """
        excess = {name: max(losses[name] - told, 0.0) for name, told in zip(self.names, self.reference, strict=True)}
        most = max(excess.values())  # by which all are divided, which changes no share
        grown = {name: weights[name] * exp(excess[name] - most) for name in self.names}
        whole = sum(grown.values())
        return {name: (1 - EVEN_SHARE) * one / whole + EVEN_SHARE / len(grown) for name, one in grown.items()}

    def batch(self, step: int, looks: Sequence[HeldOutLoss]) -> list[Row]:
        """Of a step; the first is 0. looks: at the held-out loss, that of before the first step among them.

        Of each domain the next sequences, in an order of its own for each time that it is gone through.
        """
        counts = self.drawn(step, looks)
        found = []
        for number in self._numbers(step, looks):
            found.append(self._row(number, counts[number]))
            counts[number] += 1
        return found

    def drawn(self, step: int, looks: Sequence[HeldOutLoss]) -> list[int]:
        """Sequences of each domain that the steps before this one looked at."""
        memory = self._drawn
        if memory.step > step:
            memory.step, memory.counts = 0, [0] * len(self.names)
        while memory.step < step:
            for number in self._numbers(memory.step, looks):
                memory.counts[number] += 1
            memory.step += 1
        return list(memory.counts)

    def _numbers(self, step: int, looks: Sequence[HeldOutLoss]) -> list[int]:
        """Of the domains of a step's sequences: one draw, evenly spaced places behind it. Each is drawn by its weight,
        and in a batch each has its share but for less than one sequence.
        """
        weights = next(one.domain_weights for one in reversed(looks) if one.step <= step)
        assert weights is not None, "every look weighs them"
        ends = list(accumulate(weights[name] for name in self.names))
        digest = hashlib.sha256(f"domains {self.seed} {step}".encode()).digest()
        first = Random(int.from_bytes(digest[:8], "big")).random()
        places = ((n + first) / self.batch_size * ends[-1] for n in range(self.batch_size))
        return [min(bisect_right(ends, place), len(ends) - 1) for place in places]

    def _row(self, number: int, place: int) -> Row:
        rows = self.rows[number]
        epoch, within = divmod(place, len(rows))
        kept = self._drawn.orders.get(number)
        if kept is None or kept[0] != epoch:
            kept = self._drawn.orders[number] = (epoch, order_of(len(rows), self.seed, epoch))
        return rows[kept[1][within]]

    def told(
        self,
        sides: tuple[Examples, Examples],
        looks: Sequence[HeldOutLoss],
        steps: int,
        after: tuple[Tensor, Tensor],
    ) -> list[Domain]:
        """Their part of the report. sides: what was learned from, and what was measured on. steps: that were taken.
        after: held-out losses of what was kept, as `look` has them.
        """
        learned, measured = sides
        tokens = _by_domain(learned, learned.starts.diff().double(), len(self.names)).tolist()
        counts = _by_domain(measured, after[1], len(self.names)).tolist()
        drawn, losses, before = self.drawn(steps, looks), self.losses(measured, after), looks[0].domain_losses
        last = next(one.domain_weights for one in reversed(looks) if one.step < max(steps, 1))
        assert before is not None and last is not None, "every look weighs them"
        return [
            Domain(
                name=name,
                tokens=int(tokens[n]),
                sequences=len(self.rows[n]),
                drawn=drawn[n],
                measured_tokens=int(counts[n]),
                weight_before=self.shares[name],
                weight_after=last[name],
                loss_reference=self.reference[n],
                loss_before=before[name],
                loss_after=losses[name],
            )
            for n, name in enumerate(self.names)
        ]


def evenly(examples: Examples, tokens: int) -> Examples:
    """The first examples of each domain, of so many tokens together: as many of each as far as each has them, and at
    least one.
    """
    assert examples.domains is not None, "they are told apart"
    members = [
        (examples.domains == number).nonzero()[:, 0].tolist() for number in sorted(set(examples.domains.tolist()))
    ]
    lengths, chosen = examples.lengths, list[int]()
    # The smallest first, so that what it leaves goes to the others.
    for left, own in zip(
        range(len(members), 0, -1), sorted(members, key=lambda some: sum(lengths[one] for one in some)), strict=True
    ):
        sizes = list(accumulate(lengths[one] for one in own))
        count = max(1, bisect_right(sizes, tokens // left))
        chosen += own[:count]
        tokens -= sizes[count - 1]
    return examples.chosen(sorted(chosen))


def weights_told(look: HeldOutLoss) -> str:
    """What an event says of the domains; nothing where none are weighed."""
    if look.domain_losses is None or look.domain_weights is None:
        return ""
    weights = look.domain_weights
    told = (f"{name} {loss:.4f} (from here on {weights[name]:.1%})" for name, loss in look.domain_losses.items())
    return f"; of {', '.join(told)}"


def doubts(domains: Sequence[Domain]) -> list[str]:
    """What of the domains the report should warn of."""
    worn = [f"`{one.name}` {one.drawn / one.sequences:.0f}" for one in domains if one.drawn > FEW_TIMES * one.sequences]
    if not worn:
        return []
    return [f"domains whose sequences were gone through more than {FEW_TIMES} times: {', '.join(worn)} times; add text"]


@dataclass
class _Drawn:
    """What is remembered of the draws, which could be made again. counts: sequences of each domain that the steps
    before `step` looked at. orders: by domain, of which time it is gone through, and in which order.
    """

    domains: int
    step: int = 0
    counts: list[int] = field(init=False)
    orders: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = [0] * self.domains


def _by_domain(examples: Examples, each: Tensor, count: int) -> Tensor:
    """Sums of what is said of each example, (domains,) float64."""
    assert examples.domains is not None, "they are told apart"
    return torch.zeros(count, dtype=torch.float64).index_add_(0, examples.domains, each.double())
