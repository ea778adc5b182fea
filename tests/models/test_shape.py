"""What plans count with agrees with what the engine does: which linears share an input, and the figures of its work."""

from pathlib import Path

import pytest
import torch

from models.bits import sensitivity
from models.certifying import certify, in_transformers, running
from models.measuring import evaluation
from models.quantize import autoround, awq, feedback, grid
from models.streaming import calls
from models.streaming.calls import Calls, run
from models.streaming.wiring import wiring_of
from models.texts import self_text
from squeeze.costs import memory, work
from tests.models import tiny
from tests.models.engine_parts import frame_of

FAMILIES = ("llama", "gpt2", "opt", "bloom", "falcon", "phi", "gptj", "cohere", "mixtral", "qwen2_moe", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_from_headers_groups_linears_as_running_the_block_does(family: str, tmp_path: Path) -> None:
    frame = frame_of(tiny.FAMILIES[family](tmp_path / "model"))
    last = frame.count - 1
    sites = {site.name: (site, frame.module(site)) for site in frame.sites(last)}
    ids = torch.arange(32).view(1, 32) + 100
    entering = Calls(frame, [ids])
    with frame.block(last) as block, torch.no_grad():
        batch = entering.batch(last, next(entering.enter(ids)))
        wiring = wiring_of(block, sites, lambda: run(block, batch), folds=False)
    found = [(sites[group[0]][0].columns, sorted(sites[name][0].rows for name in group)) for group in wiring.groups]
    shape = frame.source.shape()
    counted = [(group.columns, sorted(group.rows)) for group in shape.blocks[last].groups]
    assert sorted(counted) == sorted(found)
    assert len(shape.blocks) == frame.count and shape.hidden == batch[0].shape[-1]


def test_experts_see_the_tokens_that_the_router_sends_them(tmp_path: Path) -> None:
    shape = frame_of(tiny.FAMILIES["mixtral"](tmp_path / "model")).source.shape()
    shares = {group.share for group in shape.blocks[0].groups}
    assert shares == {0.5, 1.0}, "two of four"


def test_plans_count_with_the_figures_that_the_engine_works_with() -> None:
    assert work.TRIAL_VISITS == 6 * grid.SHRINK_STEPS
    assert (work.CLIP_STEPS, work.SAMPLED_ROWS) == (awq.CLIP_STEPS, awq.SEARCH_ROWS)
    assert work.LEARNED_SEQUENCES == autoround.SAMPLES
    assert work.SKETCHED_TOKENS == (sensitivity.GRADIENT_SEQUENCES, sensitivity.GRADIENT_LENGTH)
    assert work.SKETCH_ROWS == sensitivity.SKETCH_ROWS
    assert work.CERTIFIED == (running.MAX_WINDOWS, running.MAX_TOKENS)
    assert work.GENERATED_TOKENS == running.NEW_TOKENS
    assert work.SAMPLED_AT_ONCE == self_text.MOST_SEQUENCES
    assert memory.BATCH_TOKENS == calls.TOKENS_PER_BATCH_CPU
    assert memory.BAND_WEIGHTS == feedback.BAND_WEIGHTS
    assert memory.LOGIT_BYTES == evaluation.LOGIT_BYTES
    assert memory.CERTIFIER_LOGIT_BYTES == in_transformers.LOGIT_BYTES
    assert memory.LOADING_SHARE == self_text.LOADING_SHARE
    assert memory.SAMPLING_BYTES == self_text.CACHE_BYTES + self_text.SLACK_BYTES
    assert (memory.CERTIFIER_LEAST_BYTES, memory.KERNEL_BYTES) == (
        certify.LEAST_LIMIT_BYTES,
        certify.GPTQ_BYTES_PER_WEIGHT,
    )
    assert memory.MOVABLE == certify.UNPACKED
