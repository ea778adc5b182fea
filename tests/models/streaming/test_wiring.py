"""Which linears share an input and what can take over a scale is found by running a block."""

from pathlib import Path

import pytest
import torch

from models.streaming.calls import Calls, run
from models.streaming.wiring import Wiring, scale_outputs, wiring_of
from tests.models import tiny
from tests.models.engine_parts import frame_of


def wired(model: Path) -> Wiring:
    """Of the first block, with the names of its linears as they stand inside it."""
    frame = frame_of(model)
    ids = torch.arange(16).view(1, 16) + 100
    calls = Calls(frame, [ids])
    hidden = next(calls.enter(ids))
    with frame.block(0) as block, torch.no_grad():
        batch = calls.batch(0, hidden)
        prefix = f"{frame.blocks_path}.0."
        sites = {site.name.removeprefix(prefix): (site, frame.module(site)) for site in frame.sites(0)}
        before = run(block, batch).clone()
        wiring = wiring_of(block, sites, lambda: run(block, batch), folds=True)
        assert torch.equal(run(block, batch), before)  # whatever was tried was put back
    return wiring


def test_a_llama_s_norms_its_up_projection_and_its_repeated_values_can_take_scales(tmp_path: Path) -> None:
    wiring = wired(tiny.FAMILIES["llama"](tmp_path / "model"))
    assert wiring.groups == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    assert wiring.producers == {
        "self_attn.q_proj": "input_layernorm",
        "self_attn.o_proj": "self_attn.v_proj",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj",
    }
    # Four heads of 32 columns each, two of them from each head of the values.
    assert wiring.ties["self_attn.o_proj"].tolist() == [*range(32), *range(32), *range(32, 64), *range(32, 64)]
    assert not wiring.offsets


def test_norms_that_multiply_by_one_more_than_their_weight_are_told_from_others(tmp_path: Path) -> None:
    wiring = wired(tiny.FAMILIES["gemma"](tmp_path / "model"))
    assert wiring.offsets == {"input_layernorm", "post_attention_layernorm"}
    assert wiring.offsets <= set(wiring.producers.values())


def test_values_that_are_not_repeated_take_the_scale_of_the_attention_s_output(tmp_path: Path) -> None:
    wiring = wired(tiny.FAMILIES["llama"](tmp_path / "model", num_key_value_heads=4))
    assert wiring.producers["self_attn.o_proj"] == "self_attn.v_proj"


@pytest.mark.parametrize(
    ("family", "after_the_activation"),
    [("opt", {"fc2": "fc1"}), ("gpt2", {}), ("gpt_neox", {})],  # ReLU lets a scale through, GELU doesn't
)
def test_what_an_activation_function_lets_through_is_found(
    tmp_path: Path, family: str, after_the_activation: dict[str, str]
) -> None:
    producers = wired(tiny.FAMILIES[family](tmp_path / "model")).producers
    last = {"opt": "fc2", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h"}[family]
    assert {name: one for name, one in producers.items() if name == last} == after_the_activation
    assert any("norm" in one or "ln" in one for one in producers.values())


@pytest.mark.parametrize("family", [*tiny.KINDS, "gemma", "qwen2"])
def test_a_scale_that_a_producer_takes_over_leaves_the_block_as_it_was(tmp_path: Path, family: str) -> None:
    frame = frame_of(tiny.FAMILIES[family](tmp_path / "model"))
    ids = torch.arange(16).view(1, 16) + 100
    calls = Calls(frame, [ids])
    hidden = next(calls.enter(ids))
    generator = torch.Generator().manual_seed(0)
    with frame.block(0) as block, torch.no_grad():
        batch = calls.batch(0, hidden)
        prefix = f"{frame.blocks_path}.0."
        sites = {site.name.removeprefix(prefix): (site, frame.module(site)) for site in frame.sites(0)}
        wiring = wiring_of(block, sites, lambda: run(block, batch), folds=True)
        before = run(block, batch).clone()
        for group in wiring.groups:
            producer = wiring.producer(block, group[0])
            if producer is None:
                continue
            wanted = torch.rand(sites[group[0]][0].columns, generator=generator) * 3 + 0.3
            columns, rows = producer.share(wanted, torch.bfloat16)
            if producer.ties is None:
                torch.testing.assert_close(columns, wanted, rtol=0.25, atol=0)
            transposed = any(site.transposed and module is producer.module for site, module in sites.values())
            rounded = torch.bfloat16 if producer.module.weight.dim() == 1 else None  # what `columns` makes up for
            scale_outputs(producer.module, transposed, rows, offset=producer.offset, dtype=rounded)
            for name in group:
                site, linear = sites[name]
                linear.weight.mul_(columns.unsqueeze(-1) if site.transposed else columns)
        after = run(block, batch)
    assert wiring.producers
    norms_have_biases = any(isinstance(module, torch.nn.LayerNorm) for module in block.modules())
    allowed = 4e-3 if norms_have_biases else 2e-5  # biases are rounded to bfloat16 too, for which nothing makes up
    assert (after - before).abs().max() <= allowed * before.abs().max()
