"""Predicted memory against what was measured, and what it depends on."""

import pytest

from squeeze.costs.memory import Memory, needed
from squeeze.shapes.model import Shape
from tests.squeeze.making import llama, spec

# Largest resident bytes of the job's process, and of all of its processes at one moment, in millions: measured on
# 16 sequences of 256 tokens with 8 windows, by benchmarks/memory.py, on one thread of a CPU.
BUNDLED = {"rtn": (465, 865), "gptq": (489, 882), "awq": (484, 875), "autoround": (494, 874), "kquant": (490, 490)}
NARROW = {"rtn": (551, 941), "gptq": (716, 976), "awq": (788, 969), "autoround": (1017, 1017), "kquant": (720, 720)}
WIDE = {"rtn": (562, 941), "gptq": (759, 984), "awq": (862, 965), "autoround": (950, 954), "kquant": (767, 767)}
MODELS = {
    "bundled": (llama(5), BUNDLED),
    "width 1024": (llama(2, 1024), NARROW),
    "a 70B's shape at width 1024": (llama(2, 1024, inner=3584, heads=128), WIDE),
}


def _needed(shape: Shape, method: str) -> Memory:
    job = spec(method)
    stored = job.steps[0].scheme().bits_per_weight(shape.hidden) / 8
    size = int(2 * (shape.elements - shape.weights) + stored * shape.weights)
    return needed(shape, job, dict.fromkeys(job.formats, size))


@pytest.mark.parametrize("method", BUNDLED)
@pytest.mark.parametrize("model", MODELS)
def test_predictions_are_near_what_was_measured(model: str, method: str) -> None:
    shape, measured = MODELS[model]
    job, together = measured[method]
    memory = _needed(shape, method)
    assert 0.9 <= memory.job / job / 1e6 <= 1.15
    assert 0.9 <= memory.whole / together / 1e6 <= 1.15


@pytest.mark.parametrize("method", BUNDLED)
def test_the_jobs_own_process_takes_no_more_for_more_blocks(method: str) -> None:
    assert needed(llama(2), spec(method)) == needed(llama(80), spec(method))


def test_activations_may_lie_on_disk() -> None:
    many = needed(llama(), spec(data={"samples": 4096, "sequence_length": 512}))
    assert many.least < many.whole and many.least == needed(llama(), spec(data={"samples": 8192})).least
    held = 4096 * 512 * 2
    assert (many.activations, many.half_way) == ((4096 + 2 * 8) * 512 * 2 * 256, held * (256 + 768))
    rounding = needed(llama(), spec("rtn"))
    assert rounding.half_way == 0


def test_a_second_look_at_the_original_model_takes_a_second_copy() -> None:
    plain, twice = needed(llama(), spec()), needed(llama(), spec(step={"asymmetric_calibration": True}))
    assert twice.half_way == 2 * plain.half_way
    assert twice.block > plain.block and twice.method > plain.method


def test_a_model_that_samples_its_own_text_is_in_memory_whole() -> None:
    shape = llama(100, 1024)
    assert needed(shape, spec(data={"source": "self"})).job > 2 * shape.elements + needed(shape, spec()).process
    assert needed(shape, spec("rtn", data={"source": "self"})).sampling == 0


def test_formats_that_can_only_be_loaded_whole_grow_with_the_model() -> None:
    small, large = llama(8, 1024), llama(80, 1024)
    stays, grows = (
        [needed(shape, spec(formats=[name]), {name: shape.weights // 2}).certifier for shape in (small, large)]
        for name in ("compressed-tensors", "gptq")
    )
    assert stays[0] == stays[1]
    assert grows[1] > grows[0] + 2 * (large.weights - small.weights)
