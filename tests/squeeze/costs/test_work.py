"""Counted work: linear in blocks, by method in the order that they take, and equal to what can be counted by hand."""

import pytest

from squeeze.costs.work import BYTE, JUDGED_ROWS, KEEP_VISITS, VISIT, Count, Tokens, counted, of_block
from squeeze.steps.every import tag_of
from squeeze.steps.quantization import METHODS
from tests.squeeze.making import llama, spec

NAMES = [tag_of(one).partition(".")[2] for one in METHODS]


@pytest.mark.parametrize("method", NAMES)
def test_work_is_linear_in_the_blocks_with_the_rest_apart(method: str) -> None:
    two, four, eight = (counted(llama(blocks), spec(method)) for blocks in (2, 4, 8))
    for stage, count in two.items():
        assert four[stage].fixed == eight[stage].fixed == count.fixed
        assert four[stage].blocks == pytest.approx(2 * count.blocks)
        assert eight[stage].blocks == pytest.approx(4 * count.blocks)
    assert two["compressing"].blocks > 0


def test_methods_stand_in_the_order_of_the_time_that_they_take() -> None:
    shape = llama(2, 1024)
    work = [
        counted(shape, spec(method))["compressing"].whole for method in ("rtn", "gptq", "kquant", "awq", "autoround")
    ]
    assert work == sorted(work)
    plain, asymmetric = (
        counted(shape, spec("gptq", step))["compressing"].whole for step in ({}, {"asymmetric_calibration": True})
    )
    assert plain < asymmetric
    few, many = (counted(shape, spec("autoround", {"iterations": n}))["compressing"].whole for n in (10, 200))
    assert many > 5 * few


def test_gptq_is_what_can_be_counted_by_hand() -> None:
    shape, job = llama(1), spec("gptq", evaluation={"perplexity": False, "divergence": False})
    tokens = Tokens.of(shape, job, job.steps[0])
    assert tokens == Tokens(length=256, sampled=4096, calibration=4096, windows=0)
    block = shape.blocks[0]
    got = of_block(block, shape, job.steps[0], tokens)
    squares = 3 * 256**2 + 768**2
    products = 2 * block.active * 4096 + 4 * 256 * 256 * 4096  # forward: weights, attention
    products += 4096 * squares  # Hessians
    products += (3 * 256**3 + 768**3) / 3  # factors
    products += (512 + 256 + 1536) * 256**2 + 256 * 768**2  # rounding
    products += 2 * ((2 * 128 + 4 * JUDGED_ROWS) * 256**2 + JUDGED_ROWS * 768**2)  # errors, on a part of the rows
    visits = 4096 * (8 * 256 + 2 * (512 + 256 + 1536 + 256)) + 3 * squares + block.weights * (6 * 16 + 12 + KEEP_VISITS)
    moved = block.elements * (2 * BYTE + VISIT) + block.weights * BYTE
    assert got == pytest.approx(products + VISIT * visits + moved)


def test_only_jobs_that_evaluate_or_allot_have_those_stages() -> None:
    assert "evaluating" in counted(llama(), spec()) and "allotting" not in counted(llama(), spec())
    silent = counted(llama(), spec(evaluation={"perplexity": False, "divergence": False}))
    assert "evaluating" not in silent
    allotting = counted(llama(), spec(step={"bits": "auto", "target_bits": 3.5}))["allotting"]
    assert allotting.blocks > counted(llama(), spec())["compressing"].blocks


def test_each_format_is_written_and_those_that_this_installation_loads_are_certified() -> None:
    one, two = counted(llama(), spec()), counted(llama(), spec(formats=["compressed-tensors", "gptq"]))
    assert two["exporting"].whole == pytest.approx(2 * one["exporting"].whole)
    assert two["certifying"].whole == pytest.approx(2 * one["certifying"].whole)
    assert counted(llama(), spec("kquant"))["certifying"] == Count(0, 0), "llama.cpp is not of this installation"


def test_a_model_that_samples_its_own_text_has_more_to_load() -> None:
    generic, own = counted(llama(), spec()), counted(llama(), spec(data={"source": "self", "samples": 16}))
    assert own["loading"].blocks > generic["loading"].blocks == 0
