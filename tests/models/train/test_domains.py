"""Domains are weighed by what was lost in them: what is drawn follows the weights, and these follow the formula."""

import random
from dataclasses import replace
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.prune.slimming import smaller
from models.resources import Clock
from models.train.domains import EVEN_SHARE, Domains, evenly
from models.train.examples import Examples
from models.train.job import trained
from models.train.packing import Plan, Row, rows_apart
from squeeze.reports.training import HeldOutLoss, Training
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.slimming import Slim
from squeeze.steps.training import Train
from tests.models.job_parts import Heard
from tests.models.tiny import FAMILIES
from tests.models.train.parts import inputs_for, kinds, seen_in

NAMES = ("code", "prose", "sums")


def rows(*counts: int) -> tuple[tuple[Row, ...], ...]:
    numbers = iter(range(sum(counts)))
    return tuple(tuple((next(numbers),) for _ in range(count)) for count in counts)


def look(step: int, *weights: float) -> HeldOutLoss:
    named = dict(zip(NAMES, weights, strict=True))
    return HeldOutLoss(step=step, loss=1.0, domain_losses=dict.fromkeys(NAMES, 1.0), domain_weights=named)


def domains(
    *counts: int, reference: tuple[float, ...] = (1.0, 2.0, 3.0), batch_size: int = 8, seed: int = 3
) -> Domains:
    return Domains(NAMES, rows(*counts), reference, batch_size, seed)


def examples(lengths: list[int], of: list[int]) -> Examples:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    scored = torch.ones(int(starts[-1]), dtype=torch.bool)
    scored[starts[:-1]] = False
    return Examples(torch.zeros(int(starts[-1]), dtype=torch.int32), scored, starts, torch.tensor(of))


def said(*losses: float) -> tuple[Tensor, Tensor]:
    """Of one example of four tokens for each domain."""
    return torch.tensor(losses, dtype=torch.float64) * 4, torch.full((len(losses),), 4.0, dtype=torch.float64)


def test_weights_grow_with_what_was_lost_as_algorithm_1_has_it() -> None:
    # code lost log 2, prose log 3, sums gained: 0.5·2 : 0.25·3 : 0.25·1 are shares of 2.
    weights = domains(1, 1, 1).weighed(
        dict(zip(NAMES, (0.5, 0.25, 0.25), strict=True)),
        {"code": 1.0 + 0.6931471806, "prose": 2.0 + 1.0986122887, "sums": 2.5},
    )
    expected = {"code": 0.5, "prose": 0.375, "sums": 0.125}
    for name, share in expected.items():
        assert weights[name] == pytest.approx((1 - EVEN_SHARE) * share + EVEN_SHARE / 3, rel=1e-9)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)


def test_an_excess_that_no_exponential_holds_is_weighed_too() -> None:
    weights = domains(1, 1, 1).weighed(dict.fromkeys(NAMES, 1 / 3), {"code": 5001.0, "prose": 5002.0, "sums": 3.0})
    assert weights["code"] == pytest.approx(0.5, abs=1e-4) and weights["sums"] == pytest.approx(EVEN_SHARE / 3)


def test_a_look_measures_each_domain_by_itself_and_weighs_it_from_the_second_look_on() -> None:
    some, held_out = domains(6, 3, 3), examples([5, 5, 5], [0, 1, 2])
    first = some.look(0, held_out, said(2.0, 2.0, 3.0), [])
    assert first.domain_weights == {"code": 0.5, "prose": 0.25, "sums": 0.25}, "as many as there are"
    assert first.domain_losses == {"code": 2.0, "prose": 2.0, "sums": 3.0} and first.loss == pytest.approx(7 / 3)
    second = some.look(5, held_out, said(1.5, 2.0, 3.0), [first])
    whole = 0.5 * exp(0.5) + 0.5
    assert second.domain_weights is not None
    assert second.domain_weights["code"] == pytest.approx(0.5 * exp(0.5) / whole, abs=EVEN_SHARE)


def test_what_is_drawn_follows_the_weights_from_each_look_on() -> None:
    some, looks = domains(40, 40, 40), [look(0, 0.5, 0.3, 0.2), look(100, 0.1, 0.1, 0.8)]
    before, after = some.drawn(100, looks), some.drawn(300, looks)
    for count, share in zip(before, (0.5, 0.3, 0.2), strict=True):
        assert count / 800 == pytest.approx(share, abs=0.02)
    for count, earlier, share in zip(after, before, (0.1, 0.1, 0.8), strict=True):
        assert (count - earlier) / 1600 == pytest.approx(share, abs=0.02)
    for step in range(100):
        numbers = [row[0] // 40 for row in some.batch(step, looks)]
        for number, share in enumerate((0.5, 0.3, 0.2)):
            assert abs(numbers.count(number) - 8 * share) < 1, "a batch has its share, but for less than a sequence"


def test_each_domain_is_gone_through_whole_before_it_is_gone_through_again() -> None:
    some, looks = domains(7, 5, 3), [look(0, 0.6, 0.3, 0.1), look(9, 0.1, 0.5, 0.4)]
    seen = [row for step in range(40) for row in some.batch(step, looks)]
    for own in some.rows:
        of_it = [row for row in seen if row in own]
        times = [sorted(of_it[n : n + len(own)]) for n in range(0, len(of_it) - len(own) + 1, len(own))]
        assert len(times) > 3 and all(one == sorted(own) for one in times)
        assert of_it[: len(own)] != of_it[len(own) : 2 * len(own)] or len(own) < 4, "in an order of its own"


def test_a_step_s_batch_is_the_same_whoever_asks_and_when() -> None:
    looks = [look(0, 0.6, 0.3, 0.1), look(9, 0.1, 0.5, 0.4)]
    some = domains(7, 5, 3)
    straight = [some.batch(step, looks) for step in range(20)]
    steps = list(range(20))
    random.shuffle(steps)
    assert [domains(7, 5, 3).batch(step, looks) for step in range(20)] == straight
    assert {step: some.batch(step, looks) for step in steps} == dict(enumerate(straight))
    assert domains(7, 5, 3, seed=4).batch(0, looks) != straight[0]


def test_no_sequence_holds_examples_of_two_domains() -> None:
    dice = random.Random()
    lengths = [dice.randint(2, 20) for _ in range(50)]
    some = examples(lengths, [dice.randrange(3) for _ in lengths])
    assert some.domains is not None
    found = rows_apart(some, 40, packed=True)
    assert sorted(number for row in found for number in row) == list(range(50))
    assert all(len({int(some.domains[number]) for number in row}) == 1 for row in found)
    whole = Domains.of(NAMES, Plan(found, 4, 0, 10), some, (0.0, 0.0, 0.0))
    assert sum(map(len, whole.rows)) == len(found) and sum(whole.shares.values()) == pytest.approx(1)


class Torn(Exception):
    pass


class Stopped(Heard):
    """Ends the attempt after so many steps of the training."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def advance(self, done: int, total: int, unit: str) -> None:
        if (done, unit) == (self._step, "steps"):
            raise Torn


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without a block."""
    return FAMILIES["llama"](tmp_path_factory.mktemp("pruned") / "model", num_hidden_layers=2)


def asked(step: dict[str, Any]) -> JobSpec:
    """A job that leaves a block out and then trains, looking at the loss every third step."""
    base = {"steps": 8, "batch_size": 4, "learning_rate": 3e-3, "domain_column": "kind", "evaluate_every": 3}
    steps = [{"kind": "prune", "method": "depth", "blocks": 2}, {"kind": "finetune", "method": "full"} | base | step]
    data = {"source": "file-abcdefgh", "samples": 4, "sequence_length": 48}
    return JobSpec.model_validate({"model": "org/model", "data": data, "evaluation": {"samples": 8}, "steps": steps})


def learned(step: dict[str, Any], model: Path, pruned: Path, room: Path, heard: Heard | None = None) -> Training:
    """What the job's second step tells, given what the first one would hand on."""
    spec = asked(step)
    inputs, training = inputs_for(spec, model, room, kinds()), spec.steps[1]
    assert isinstance(training, Train)
    if training.kind == "distill":
        inputs = replace(inputs, student=pruned, student_name="pruned")
    else:
        inputs = replace(inputs, model=pruned, teacher=model)
    return trained(inputs, training, inputs.work / "adapter", None, Clock(), heard or Heard()).training


def test_a_training_of_weighed_domains_goes_on_to_the_same_bits_and_tells_of_each(
    tmp_path: Path, model: Path, pruned: Path
) -> None:
    before = learned({}, model, pruned, tmp_path / "whole")
    with pytest.raises(Torn):
        learned({}, model, pruned, tmp_path / "room", Stopped(random.randrange(2, 8)))
    after = learned({}, model, pruned, tmp_path / "room")
    assert after.resumed and not before.resumed and after.loss_after == before.loss_after
    assert seen_in(after.curve) == seen_in(before.curve) and after.held_out == before.held_out
    assert after.domains == before.domains

    assert [one.step for one in before.held_out] == [0, 3, 6, 8]
    told = {one.name: one for one in before.domains}
    assert list(told) == ["lists", "sums", "words"]
    assert before.data.domains is not None and before.data.held_out_domains is not None
    whole = {name: count + before.data.held_out_domains[name] for name, count in before.data.domains.items()}
    assert whole == {"lists": 15, "sums": 30, "words": 15}
    assert sum(one.drawn for one in told.values()) == 32
    reference = {name: one.loss_reference for name, one in told.items()}
    for earlier, later in pairwise(before.held_out):
        assert earlier.domain_weights is not None and later.domain_losses is not None
        raised = {
            name: weight * exp(max(later.domain_losses[name] - reference[name], 0))
            for name, weight in earlier.domain_weights.items()
        }
        for name, one in raised.items():
            assert later.domain_weights is not None
            assert later.domain_weights[name] == pytest.approx(one / sum(raised.values()), abs=2 * EVEN_SHARE)
    measured = {name: one.loss_after * one.measured_tokens for name, one in told.items()}
    assert sum(measured.values()) / before.measured_tokens == pytest.approx(before.loss_after, rel=1e-6)


def test_what_follows_a_pruning_knows_the_model_from_before(tmp_path: Path, model: Path) -> None:
    spec = asked({})
    inputs, step = inputs_for(spec, model, tmp_path, kinds()), spec.steps[0]
    assert isinstance(step, Slim)
    done = smaller.slimmed(inputs, step, Clock(), Heard())
    following = smaller.for_what_follows(inputs, done)
    assert (following.model, following.teacher) == (done.whole, model)
    later = smaller.for_what_follows(replace(inputs, teacher=tmp_path / "first"), done)
    assert later.teacher == tmp_path / "first", "what was taken first counts"


def test_domains_are_held_against_the_model_before_it_was_pruned_or_the_teacher(
    tmp_path: Path, model: Path, pruned: Path
) -> None:
    finetuned = learned({"steps": 1}, model, pruned, tmp_path / "one")
    taught = learned({"kind": "distill", "method": "logits", "steps": 1}, model, pruned, tmp_path / "two")
    assert taught.distillation is not None
    for one, other in zip(finetuned.domains, taught.domains, strict=True):
        assert one.loss_reference == pytest.approx(other.loss_reference, rel=1e-6)
        assert one.loss_before == pytest.approx(other.loss_before, rel=1e-6)
    whole = sum(one.loss_reference * one.measured_tokens for one in taught.domains) / taught.measured_tokens
    assert taught.distillation.loss_teacher == pytest.approx(whole, rel=1e-6)


def test_as_many_tokens_of_each_domain_are_measured_as_far_as_each_has_them() -> None:
    some = examples([10] * 30, [0] * 25 + [1] * 3 + [2] * 2)
    found = evenly(some, 150)
    assert found.domains is not None and found.domains.bincount().tolist() == [10, 3, 2]
    least = evenly(some, 1)
    assert least.domains is not None and least.domains.bincount().tolist() == [1, 1, 1]
