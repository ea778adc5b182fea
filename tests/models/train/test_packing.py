"""Packed examples are strangers to each other; every example is seen once an epoch; schedules are transformers'."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from models.train.examples import Examples
from models.train.packing import UNSCORED, Plan, batch_of, rows_of, steps_for
from models.train.schedule import learning_rate
from models.train.scoring import example_losses, learned_losses, logits_of, packs
from tests.models.tiny import FAMILIES, VOCABULARY

CPU = torch.device("cpu")


def examples(lengths: list[int], seed: int = 0) -> Examples:
    dice = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, VOCABULARY, (int(starts[-1]),), generator=dice, dtype=torch.int32)
    scored = torch.rand(len(ids), generator=dice) < 0.7
    scored[starts[:-1]] = False
    return Examples(ids, scored, starts)


def loaded(family: str, room: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(FAMILIES[family](room / family), dtype=dtype).eval()


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60), st.booleans())
@settings(deadline=None)
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths: list[int], packed: bool) -> None:
    rows = rows_of(lengths, 32, packed=packed)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    sizes = [sum(lengths[number] for number in row) for row in rows]
    assert max(sizes) <= 32
    if packed:
        assert sum(sorted(sizes)[:2]) > 32 or len(rows) == 1, "two rows would have fitted into one"


# Of each way that positions and masks are made: rotary, learned, windows over neighbours, soft caps, a mixture.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gemma2", "qwen3_moe"])
def test_packed_logits_are_those_of_each_example_alone(tmp_path: Path, family: str) -> None:
    model, some = loaded(family, tmp_path), examples([9, 17, 5, 12, 20])
    assert packs(model, CPU, VOCABULARY)
    rows = rows_of(some.lengths, 40, packed=True)
    assert len(rows) < 3
    batch = batch_of(some, rows)
    with torch.no_grad():
        logits = logits_of(model, batch, packed=True)
        for number in range(len(some)):
            ids, scored = some.one(number)
            alone = model(input_ids=ids[None].long()).logits[0]
            own = batch.owners == number
            assert (logits[own] - alone).abs().max() < 1e-5 * max(1.0, float(alone.abs().max()))
            expected = [*torch.where(scored[1:], ids[1:].long(), UNSCORED).tolist(), UNSCORED]
            assert batch.targets[own].tolist() == expected


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_models_that_count_positions_themselves_are_found_out(tmp_path: Path, family: str) -> None:
    assert not packs(loaded(family, tmp_path), CPU, VOCABULARY)


def test_every_family_s_losses_are_those_of_its_whole_logits(tmp_path: Path) -> None:
    some = examples([9, 17, 5, 12])
    batch = batch_of(some, [(0,), (1,), (2,), (3,)])
    learned = batch.targets != UNSCORED
    for family in FAMILIES:
        model = loaded(family, tmp_path)
        with torch.no_grad():
            logits = logits_of(model, batch, packed=False)
            whole = torch.nn.functional.cross_entropy(logits[learned].float(), batch.targets[learned], reduction="none")
            torch.testing.assert_close(learned_losses(model, batch, packed=False), whole, atol=1e-4, rtol=1e-4)


def test_the_held_out_loss_is_the_same_packed_and_not(tmp_path: Path) -> None:
    model, some = loaded("llama", tmp_path), examples([9, 17, 5, 12, 20, 3, 31])
    packed, alone = (
        example_losses(model, some, rows_of(some.lengths, 40, packed=way), packed=way, size=size, device=CPU)
        for way, size in ((True, 2), (False, None))
    )
    assert torch.equal(packed[1], alone[1]) and int(alone[1].sum()) == int(some.scored.sum())
    assert packed[0].tolist() == pytest.approx(alone[0].tolist(), rel=1e-5)


def test_every_epoch_shows_each_row_once_in_an_order_of_its_own() -> None:
    rows = [(n,) for n in range(10)]
    plan = Plan(rows, 4, 7, 5)
    seen = [row for step in range(5) for row in plan.batch(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == rows and seen[:10] != seen[10:]
    assert plan.batch(3) == Plan(rows, 4, 7, 5).batch(3)
    assert plan.batch(0) != Plan(rows, 4, 8, 5).batch(0)


def test_epochs_and_tokens_become_steps() -> None:
    rows, lengths = [(n,) for n in range(10)], [5] * 10
    assert steps_for(rows, lengths, 4, 0, epochs=None, tokens=None) == 3
    assert steps_for(rows, lengths, 4, 0, epochs=2.0, tokens=None) == 5
    assert steps_for(rows, lengths, 4, 0, epochs=None, tokens=21) == 2
    assert steps_for(rows, lengths, 4, 0, epochs=None, tokens=101) == 6
    assert steps_for(rows, lengths, 4, 0, epochs=0.01, tokens=None) == 1


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates_are_those_of_transformers(schedule: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = {
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, 3, 17),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, 3, 17),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, 3),
    }[schedule]()
    for step in range(17):
        assert learning_rate(0.3, schedule, step, 17, 3) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)
        optimizer.step()
        theirs.step()
