"""Several real processes that share one training, against one process that does it alone."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from models.streaming.team import Team
from models.train.examples import Examples
from models.train.packing import UNSCORED
from models.train.prepare import prepare
from models.train.processes import Processes
from squeeze.errors import SpecInvalid
from squeeze.steps.sharding import refuse_without_library, state_bytes, way_for
from squeeze.steps.training import Train
from tests.models import tiny
from tests.models.train.parts import inputs_for, spec_of

ZERO = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
LORA = {"steps": 4, "micro_batch_size": 1, "evaluate_every": 2}
FULL = {"method": "full", "learning_rate": 1e-3, "steps": 4, "micro_batch_size": 1}

Ask = Callable[..., list[dict[str, Any]]]
Alone = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 64, "intermediate_size": 128}
    return tiny.FAMILIES["llama"](tmp_path_factory.mktemp("narrow") / "model", **shape)


@pytest.fixture(scope="module")
def ask(model: Path) -> Iterator[Ask]:
    """Has a team run a case of `tests.models.train.teammates`."""
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "tests.models.train.teammates"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        lines, answers = process.stdin, process.stdout

        def ask(work: Path, step: dict[str, Any], size: int, **more: Any) -> list[dict[str, Any]]:
            modules = [] if "method" in step else ["gptqmodel"]  # at which peft looks
            modules += ["deepspeed"] if "zero" in step.get("sharding", "") else []
            case = {"model": str(model), "work": str(work), "step": step, "size": size, "modules": modules} | more
            lines.write(json.dumps(case) + "\n")
            lines.flush()
            told: list[dict[str, Any]] = json.loads(answers.readline())
            return told

        yield ask


@pytest.fixture(scope="module")
def alone(ask: Ask, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """What one process says of a training; each once."""

    @functools.cache
    def run(step: str) -> dict[str, Any]:
        (told,) = ask(tmp_path_factory.mktemp("alone") / "work", json.loads(step), 1)
        assert told["says"] == "done"
        return told

    return lambda step: run(json.dumps(step))


def assert_same(team: list[dict[str, Any]], one: dict[str, Any], way: str, near: float = 1e-5) -> None:
    """The losses, learning rates to the bit; that what was written loses the same."""
    assert [each["says"] for each in team] == ["done"] * len(team)
    leader = team[0]
    assert leader["sharding"] == way and leader["files"].keys() == one["files"].keys()
    assert any(message.startswith(f"{len(team)} processes share the training") for message in leader["messages"])
    losses, rates, norms = (list(column) for column in zip(*leader["curve"], strict=True))
    expected_losses, expected_rates, expected_norms = (list(column) for column in zip(*one["curve"], strict=True))
    assert losses == pytest.approx(expected_losses, abs=near) and rates == expected_rates
    assert norms == pytest.approx(expected_norms, rel=10 * near)
    assert leader["held_out"] == pytest.approx(one["held_out"], abs=near)
    assert leader["after"] == pytest.approx(one["after"], abs=near)
    if one["written"] is not None:
        assert leader["written"] == pytest.approx(one["written"], abs=10 * near)  # rounded to 16 bits


def test_two_processes_lose_what_one_does_whether_each_holds_all_weights_or_a_part(
    ask: Ask, alone: Alone, tmp_path: Path
) -> None:
    assert_same(ask(tmp_path / "whole", FULL, 2), alone(FULL), "ddp")  # as `auto` has it
    assert_same(ask(tmp_path / "parts", FULL | {"sharding": "full"}, 2), alone(FULL), "full")


@pytest.mark.parametrize(
    ("base", "size", "near"),
    [
        ("nf4", 2, 1e-5),
        pytest.param("nf4", 3, 1e-5, marks=pytest.mark.slow),
        # Rounds inputs too: a last bit may take one of them to the next code.
        pytest.param("int8", 2, 5e-3, marks=pytest.mark.slow),
        pytest.param("gptq", 2, 1e-5, marks=pytest.mark.slow),
        pytest.param("gptq", 3, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_adapters_beside_rounded_weights_learn_the_same_in_several_processes(
    ask: Ask, tmp_path: Path, base: str, size: int, near: float
) -> None:
    step = LORA | {"method": "qlora", "base": base, "rank": 4, "merge": True}
    both = []
    for number in (1, size):  # records enough for a whole batch of each process, so that gptq finds the same codes
        both.append(ask(tmp_path / str(number), step, number, records=300, modules=["gptqmodel"]))
    assert_same(both[1], both[0][0], "ddp", near)
    codes = [{path.name: path.read_bytes() for path in (tmp_path / str(n)).rglob("block-*")} for n in (1, size)]
    assert codes[0] == codes[1] and len(codes[0]) == (2 if base == "gptq" else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "size"),
    [
        ({"method": "hidden", "micro_batch_size": 1}, 2),
        ({"method": "hidden", "match": "relations"}, 3),
        ({"method": "on_policy", "new_tokens": 6, "micro_batch_size": 1}, 2),
        ({"method": "on_policy", "new_tokens": 6, "own_share": 0.5, "alpha": 0.5}, 3),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else str(value),
)
def test_students_beside_a_whole_teacher_learn_the_same_in_several_processes(
    ask: Ask, narrow: Path, tmp_path: Path, step: dict[str, Any], size: int
) -> None:
    """The student is of half the width: what takes it to the teacher's learns beside it."""
    step = step | {"kind": "distill", "student": {"model": "org/n"}, "learning_rate": 3e-3, "steps": 4}
    one, team = (ask(tmp_path / str(number), step, number, student=str(narrow)) for number in (1, size))
    assert_same(team, one[0], "ddp")


@pytest.mark.slow
@pytest.mark.parametrize(("size", "way"), [(2, "ddp"), (3, "full")])
def test_domains_weigh_the_same_in_several_processes(
    ask: Ask, narrow: Path, tmp_path: Path, size: int, way: str
) -> None:
    step = {"kind": "distill", "method": "logits", "student": {"model": "org/n"}, "learning_rate": 3e-3, "steps": 6}
    step |= {"domain_column": "kind", "evaluate_every": 2}
    one = ask(tmp_path / "1", step, 1, student=str(narrow))[0]
    team = ask(tmp_path / "team", step | {"sharding": way}, size, student=str(narrow))
    assert_same(team, one, way)
    for alone, shared in zip(one["weights"], team[0]["weights"], strict=True):
        assert shared == pytest.approx(alone, rel=1e-3)
    assert one["weights"][0] != one["weights"][-1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("way", ["ddp", "full", "hybrid", "offload"])
@pytest.mark.parametrize(
    "step",
    [
        LORA | {"merge": True},
        FULL | {"activation_checkpointing": True},
        {"method": "last_layers", "layers": 1, "learning_rate": 1e-3, "steps": 4, "packing": False},
    ],
    ids=lambda step: step.get("method", "lora"),
)
def test_any_number_of_processes_loses_what_one_does(
    ask: Ask, alone: Alone, tmp_path: Path, way: str, size: int, step: dict[str, Any]
) -> None:
    if way == "hybrid" and size % 2:
        return
    assert_same(ask(tmp_path, step | {"sharding": way}, size), alone(step), way)


@ZERO
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("way", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize(
    "step",
    [
        LORA,
        LORA | {"dora": True, "merge": True},
        FULL | {"activation_checkpointing": True, "ema": 0.9, "evaluate_every": 2},
        {"method": "last_layers", "layers": 1, "learning_rate": 1e-3, "steps": 4, "packing": False},
    ],
    ids=lambda step: step.get("method", "lora"),
)
def test_deepspeed_loses_what_one_process_does(
    ask: Ask, alone: Alone, tmp_path: Path, way: str, size: int, step: dict[str, Any]
) -> None:
    assert_same(ask(tmp_path, step | {"sharding": way}, size), alone(step), way)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize(
    ("way", "dropout"),
    [("ddp", 0.1), ("full", 0.1), pytest.param("zero2", 0.1, marks=ZERO), pytest.param("zero3", 0.1, marks=ZERO)],
)
def test_a_process_that_is_killed_fails_the_others_and_the_training_goes_on_to_the_same_bits(
    ask: Ask, tmp_path: Path, killed: int, way: str, dropout: float
) -> None:
    step = {"steps": 6, "evaluate_every": 2, "dropout": dropout, "sharding": way}
    (quiet, _) = ask(tmp_path / "quiet", step, 2)
    first = ask(tmp_path / "team", step, 2, signals=[killed, 3, "SIGKILL"])
    assert first[killed] == {"says": "", "status": -9}
    assert first[1 - killed]["says"].startswith("ProcessKilled: One of the 2 processes that share this job ended")
    again = ask(tmp_path / "team", step, 2)
    assert [one["says"] for one in again] == ["done"] * 2
    assert again[0]["resumed"] in ([2], [3])
    for key in ("curve", "held_out", "after", "files"):
        assert again[0][key] == quiet[key]


@pytest.mark.slow
def test_a_training_goes_on_by_another_number_of_processes_that_hold_other_parts(
    ask: Ask, alone: Alone, tmp_path: Path
) -> None:
    step = FULL | {"steps": 8, "evaluate_every": 2}
    turns = [(2, "full", 2), (4, "hybrid", 4), (3, "ddp", 5), (1, "auto", 6)]
    for size, way, steps in turns:
        ask(tmp_path, step | {"sharding": way}, size, signals=[0, steps, "SIGKILL"])
    last = ask(tmp_path, step | {"sharding": "offload"}, 2)
    assert_same(last, alone(step), "offload")
    assert len(last[0]["resumed"]) == 4


@ZERO
@pytest.mark.slow
def test_a_training_moves_between_deepspeed_and_the_other_ways(ask: Ask, alone: Alone, tmp_path: Path) -> None:
    step = FULL | {"steps": 8, "evaluate_every": 2, "ema": 0.5}
    turns = [(2, "zero3", 1), (3, "full", 2), (3, "zero2", 4), (2, "ddp", 5), (2, "zero1", 6), (1, "auto", 7)]
    for size, way, steps in turns:
        ask(tmp_path, step | {"sharding": way}, size, signals=[0, steps, "SIGKILL"])
    last = ask(tmp_path, step | {"sharding": "zero3"}, 3)
    assert_same(last, alone(step), "zero3")
    assert len(last[0]["resumed"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("way", ["full", pytest.param("zero3", marks=ZERO)])
def test_whichever_process_is_asked_to_end_all_do_and_leave_a_checkpoint_of_the_last_step(
    ask: Ask, alone: Alone, tmp_path: Path, asked: int, way: str
) -> None:
    ended = ask(tmp_path, LORA | {"sharding": way}, 2, signals=[asked, 2, "SIGTERM"], snapshot_seconds=1e9)
    assert [one["status"] for one in ended] == [-15, -15]
    again = ask(tmp_path, LORA | {"sharding": way}, 2)
    assert again[0]["resumed"] == [2]
    assert_same(again, alone(LORA), way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "full", pytest.param("zero1", marks=ZERO), pytest.param("zero3", marks=ZERO)])
def test_a_loss_that_is_no_number_ends_all_with_the_same_words(ask: Ask, tmp_path: Path, way: str) -> None:
    told = ask(tmp_path, FULL | {"sharding": way}, 2, spoil=2)
    assert told[0]["says"] == told[1]["says"]
    assert told[0]["says"].startswith("NotFinite: the loss became nan at step 3")


@pytest.mark.slow
def test_what_one_process_writes_is_written_by_several(ask: Ask, tmp_path: Path) -> None:
    (one,) = ask(tmp_path / "one", {"steps": 4, "init": "pissa", "merge": True}, 1)
    team = ask(tmp_path / "team", {"steps": 4, "init": "pissa", "merge": True, "sharding": "full"}, 2)
    assert_same(team, one, "full")


def test_sequences_are_dealt_out_and_who_has_too_few_repeats_one_that_counts_for_nothing() -> None:
    ids = torch.arange(50, dtype=torch.int32)
    examples = Examples(ids, torch.ones(50, dtype=torch.bool), torch.arange(0, 51, 10))
    rows = [(number,) for number in range(5)]
    for size in (None, 1, 2):
        dealt = [Processes(Team(rank, 3)).batches(examples, rows, size) for rank in range(3)]
        assert len({len(parts) for parts in dealt}) == 1
        owners = [number for parts in dealt for part in parts for number in part.owners[part.owners >= 0].tolist()]
        assert sorted(set(owners)) == list(range(5)) and len(owners) == 50
        assert sum(part.learned for parts in dealt for part in parts) == 45
    idle = Processes(Team(2, 3)).batches(examples, rows, 1)[-1]
    assert idle.learned == idle.tokens == 0 and bool((idle.targets == UNSCORED).all()) and idle.ids.shape == (1, 10)


def test_deepspeed_is_asked_for_by_name_alone_and_missed_before_the_model_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not there
    for way in ("ddp", "full", "auto"):
        refuse_without_library(way)
    spec = spec_of(FULL | {"sharding": "zero3"}, limits={"gpus": 2})
    step = spec.steps[0]
    assert isinstance(step, Train)
    with pytest.raises(SpecInvalid, match=r"DeepSpeed, which this worker has not: take full.*/deepspeed\.txt"):
        prepare(inputs_for(spec, tmp_path / "no model", tmp_path / "room"), step)


def test_whole_weights_are_held_where_they_fit_else_parts_else_parts_in_host_memory() -> None:
    billion = 10**9
    assert state_bytes(7 * billion, 0, 2) == 14 * billion
    assert state_bytes(7 * billion, 7 * billion, 2) == 112 * billion
    for needed, processes, way in ((14, 2, "ddp"), (112, 2, "offload"), (112, 4, "full"), (40, 2, "ddp")):
        assert way_for(needed * billion, 80 * billion, processes) == way
