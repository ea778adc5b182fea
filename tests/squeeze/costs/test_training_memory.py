"""Predicted memory of trainings against what was measured, and what it depends on."""

from typing import Any

import pytest

from squeeze.costs.trainable import learned
from squeeze.costs.training_memory import TrainingMemory, needed_to_train
from squeeze.names import Format
from squeeze.shapes.model import shape_of
from squeeze.steps.finetuning import Finetune
from tests.squeeze.making import config, tensors, training

BOTH: dict[Format, int] = {"peft": 0}
MOVEMENT = {"kind": "prune", "method": "movement"}
BF16, CHECKPOINTED = {"precision": "bf16"}, {"activation_checkpointing": True}

# (width, blocks, vocabulary), tokens of a sequence, the step; the largest resident bytes of the job's process, and of
# all of its processes at one moment where they were measured, in millions: by benchmarks/training_memory.py, on one
# thread of a CPU.
MEASURED: tuple[tuple[tuple[int, int, int], int, dict[str, Any], int, int | None], ...] = (
    ((256, 5, 4096), 256, {"micro_batch_size": 4}, 905, 1229),
    ((256, 5, 4096), 512, {"batch_size": 16}, 2399, 2392),
    ((512, 4, 4096), 512, {"micro_batch_size": 1}, 877, 1275),
    ((512, 4, 4096), 512, {"micro_batch_size": 4}, 1427, 1427),
    ((512, 8, 4096), 1024, {"micro_batch_size": 2}, 2005, 2005),
    ((512, 4, 32000), 512, {"micro_batch_size": 2}, 1450, 1451),
    ((1024, 4, 4096), 512, {"micro_batch_size": 2}, 1528, 1528),
    ((1024, 4, 32000), 256, {"micro_batch_size": 1}, 1267, 1615),
    ((512, 4, 4096), 512, CHECKPOINTED | {"micro_batch_size": 4}, 843, 1283),
    ((512, 4, 4096), 512, BF16 | {"micro_batch_size": 4}, 1251, 1272),
    ((1024, 8, 4096), 256, {"method": "qlora", "base": "nf4", "micro_batch_size": 2}, 1142, 1352),
    ((512, 4, 4096), 512, {"method": "full", "micro_batch_size": 2}, 1021, 1021),
    ((1024, 4, 4096), 256, BF16 | {"method": "full", "micro_batch_size": 2}, 1706, 1706),
    ((512, 4, 4096), 512, MOVEMENT | {"micro_batch_size": 2}, 1270, 1270),
    ((1024, 8, 4096), 256, {"method": "last_layers", "micro_batch_size": 2}, 1367, 1480),
)


def needed(
    size: tuple[int, int, int], length: int, step: dict[str, Any] | None = None, text_bytes: int = 0
) -> TrainingMemory:
    width, blocks, vocabulary = size
    told = config(width, vocab_size=vocabulary, max_position_embeddings=2048)
    sides = tensors(blocks, width, vocabulary=vocabulary)
    spec = training(step, data={"source": "file-abcdefgh", "sequence_length": length})
    (method,) = spec.steps
    assert isinstance(method, Finetune)
    return needed_to_train(shape_of(told, sides), spec, method, learned(method, told, sides), BOTH, text_bytes)


@pytest.mark.parametrize(("size", "length", "step", "job", "together"), MEASURED)
def test_predictions_are_near_what_was_measured(
    size: tuple[int, int, int], length: int, step: dict[str, Any], job: int, together: int | None
) -> None:
    memory = needed(size, length, step)
    assert 0.85 <= memory.job / job / 1e6 <= 1.15
    if together is not None:
        assert 0.85 <= memory.whole / together / 1e6 <= 1.15


def test_a_parameter_that_learns_takes_sixteen_bytes_beside_the_weights_and_twelve_as_one_of_them() -> None:
    size = (256, 4, 4096)
    lora, full = needed(size, 64), needed(size, 64, {"method": "full"})
    apart = 4 * 16 * (512 + 2 * 384 + 512 + 3 * 1024)
    assert lora.learning == 20 * apart, "and four of what it began as"
    assert full.weights == lora.weights and full.learning == 12 * full.weights // 4
    looked_at = needed(size, 64, {"method": "full", "evaluate_every": 5})
    assert looked_at.learning == 16 * full.weights // 4
    half = needed(size, 64, BF16)
    assert 2 * half.weights == lora.weights and half.learning == lora.learning


def test_activations_grow_with_the_micro_batch_and_its_tokens_and_hardly_with_blocks_where_checkpointed() -> None:
    one, four = (needed((512, 8, 4096), 128, {"micro_batch_size": n}) for n in (1, 4))
    assert four.activations == pytest.approx(4 * one.activations) and four.passing == pytest.approx(4 * one.passing)
    plain, checkpointed = (needed((512, 64, 4096), 512, {"micro_batch_size": 1} | more) for more in ({}, CHECKPOINTED))
    assert checkpointed.activations < plain.activations / 8
    few, many = (needed((512, blocks, 4096), 512, CHECKPOINTED).activations for blocks in (8, 16))
    assert many - few == 8 * 8 * 512 * 512 * 4
    last, full = (needed((512, 8, 4096), 128, {"method": name}).activations for name in ("last_layers", "full"))
    assert 4 * last == pytest.approx(full)


def test_a_head_takes_no_logits_of_tokens_and_nothing_of_blocks_that_stay() -> None:
    size = (512, 8, 32000)
    alone, one, blocks = (
        needed(size, 128, {"method": "head", "layers": 0}),
        needed(size, 128, {"method": "head", "layers": 1}),
        needed(size, 128, {"method": "last_layers", "layers": 1}),
    )
    assert alone.learning == 12 * 2 * 512 and alone.activations == 0
    assert one.learning - blocks.learning == 12 * 2 * 512 and one.activations > 0
    assert one.passing < blocks.passing / 5 and one.certifier < blocks.certifier


def test_a_base_of_gptq_takes_half_a_byte_a_weight_and_what_rounding_it_takes_at_the_most() -> None:
    size, qlora = (1024, 8, 4096), {"method": "qlora", "micro_batch_size": 1}
    nf4, gptq, plain = (needed(size, 64, step) for step in (qlora, qlora | {"base": "gptq"}, {"micro_batch_size": 1}))
    weights = 8 * 1024 * 1024 * (1 + 2 * 0.5 + 1 + 3 * 3)
    assert plain.weights - gptq.weights == weights * (4 - 4.125 / 8) and nf4.rounding == 0 < gptq.rounding
    assert abs(gptq.weights - nf4.weights) < 0.01 * nf4.weights
    assert gptq.certifier - nf4.certifier > 2 * weights, "what kernels make of the codes"
    narrow, wide = (needed((width, 2, 4096), 64, qlora | {"base": "gptq"}) for width in (256, 2048))
    assert narrow.job == narrow.process + narrow.rounding or narrow.rounding < wide.rounding
    assert wide.job == wide.process + wide.rounding > wide.process + wide.weights


def test_a_large_vocabulary_and_many_examples_take_room() -> None:
    small, large = (needed((512, 4, vocabulary), 512) for vocabulary in (4096, 128000))
    assert large.passing == 3 * 8 * 512 * 128000 * 4 > 20 * small.passing
    empty, full = (needed((512, 4, 4096), 512, text_bytes=size) for size in (0, 10**9))
    assert full.process == empty.process + 3 * 10**9
