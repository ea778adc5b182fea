"""Counted work of a training: linear in blocks and tokens, and equal to what can be counted by hand."""

from typing import Any

import pytest

from squeeze.costs.trainable import Learned, learned
from squeeze.costs.training_work import UPDATE_VISITS, counted_training, tokens_to_train
from squeeze.costs.work import TEXTS, VISIT, Count, of_head, of_token
from squeeze.costs.work import counted as quantizing
from squeeze.shapes.model import Shape
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.finetuning import Finetune
from tests.squeeze.making import config, llama, spec, tensors, training

TOKENS = 8 * 256 * 10


def parts(blocks: int, step: dict[str, Any] | None = None) -> tuple[Shape, JobSpec, Finetune, Learned]:
    spec = training(step)
    (method,) = spec.steps
    assert isinstance(method, Finetune)
    return llama(blocks), spec, method, learned(method, config(), tensors(blocks))


def counted(blocks: int, step: dict[str, Any] | None = None, tokens: int = TOKENS) -> dict[str, Count]:
    return counted_training(*parts(blocks, step), tokens, last=True)


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt", "prefix"])
def test_work_is_linear_in_the_blocks_and_in_the_tokens(method: str) -> None:
    two, four, eight = (counted(blocks, {"method": method}) for blocks in (2, 4, 8))
    for stage in two:
        assert four[stage].blocks - two[stage].blocks == pytest.approx((eight[stage].blocks - four[stage].blocks) / 2)
    once, twice, thrice = (counted(2, {"method": method}, n * TOKENS)["training"].whole for n in (1, 2, 3))
    assert thrice - twice == pytest.approx(twice - once)


def test_a_training_is_what_can_be_counted_by_hand() -> None:
    shape, spec, step, what = parts(2)
    assert what.parameters == 2 * 16 * (512 + 2 * 384 + 512 + 3 * 1024)
    block, head = of_token(shape.blocks[0], shape, 256), of_head(shape)
    looks = 2 * spec.evaluation.samples * 256
    blocks = TOKENS * (2 * 2 * block + 6 * what.parameters) + looks * 2 * block
    fixed = (2 * TOKENS + looks) * head + 10 * UPDATE_VISITS * VISIT * what.parameters
    assert counted(2)["training"] == Count(pytest.approx(fixed), pytest.approx(blocks))
    assert counted_training(shape, spec, step, what, TOKENS, last=False).keys() == {"loading", "training", "exporting"}
    assert counted(2)["loading"].fixed > TEXTS


def test_what_learns_of_the_weights_themselves_costs_half_as_much_again() -> None:
    lora, full, last = (counted(8, step)["training"].whole for step in ({}, {"method": "full"}, _LAST))
    assert last < lora < full < 1.6 * lora
    again = counted(8, {"activation_checkpointing": True})["training"].whole
    assert 1.3 * lora < again < 1.5 * lora
    assert counted(8, {"evaluate_every": 1})["training"].whole > lora


_LAST = {"method": "last_layers", "layers": 2}


def test_a_base_of_gptq_is_rounded_measured_and_written_first() -> None:
    nf4, gptq = (counted(4, {"method": "qlora", "base": base}) for base in ("nf4", "gptq"))
    assert gptq.keys() - nf4.keys() == {"compressing", "evaluating"}
    rounded = quantizing(llama(4), spec("gptq", data={"sequence_length": 256}, evaluation={"samples": 4}))
    assert all(gptq[stage] == rounded[stage] for stage in ("compressing", "evaluating"))
    assert gptq["exporting"].blocks - nf4["exporting"].blocks == rounded["exporting"].blocks
    assert gptq["certifying"].whole == pytest.approx(2 * nf4["certifying"].whole)
    assert nf4["training"].whole < gptq["training"].whole < 1.1 * nf4["training"].whole, "one look more"


def test_only_a_whole_model_takes_long_to_write() -> None:
    assert counted(8, {"merge": True})["exporting"].whole > 100 * counted(8)["exporting"].whole
    assert counted(8, {"merge": True})["certifying"].whole == pytest.approx(2 * counted(8)["certifying"].whole)


@pytest.mark.parametrize(
    ("step", "text_bytes", "tokens"),
    [
        ({"steps": 5}, None, 5 * 8 * 256),
        ({"tokens": 1000}, None, 1000),
        ({}, None, None),
        ({"epochs": 2}, 35_000, 18_000),
        ({}, 35_000, 9_000),
    ],
)
def test_tokens_are_those_asked_for_or_those_of_the_text(
    step: dict[str, Any], text_bytes: int | None, tokens: int | None
) -> None:
    _, spec, method, _ = parts(1, step)
    assert tokens_to_train(spec, method, 256, text_bytes) == tokens
