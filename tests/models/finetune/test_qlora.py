"""Adapters beside rounded weights: what learns, that the gradient reaches it, and what is written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import LlamaConfig, LlamaForCausalLM

from models.finetune.packed import PackedLinear
from models.pipeline import check
from models.train.packing import batch_of
from models.train.scoring import learned_losses, own
from models.train.task import accelerator_of
from squeeze.errors import FormatUnfit, GroupSizeIndivisible
from tests.models.job_parts import Heard
from tests.models.tiny import FAMILIES
from tests.models.train.parts import begin, go_on, inputs_for, seen, spec_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


def asked(**fields: Any) -> Any:
    return spec_of({"method": "qlora", "rank": 4} | fields)


@pytest.mark.parametrize(("base", "kind"), [("nf4", Linear4bit), ("int8", Linear8bitLt), ("gptq", PackedLinear)])
def test_the_loss_falls_beside_rounded_weights(tmp_path: Path, model: Path, base: str, kind: type) -> None:
    task, story = go_on(inputs_for(asked(base=base), model, tmp_path))
    assert isinstance(own(task.model).model.layers[0].self_attn.q_proj.get_base_layer(), kind)
    assert not isinstance(own(task.model).lm_head, kind)
    assert {one.dtype for one in task.learning.values()} == {torch.float32}
    assert story.held_out[-1].loss < 0.9 * story.held_out[0].loss


@pytest.mark.parametrize("base", ["nf4", "int8", "gptq"])
def test_a_look_at_the_held_out_loss_takes_no_gradient_away(tmp_path: Path, model: Path, base: str) -> None:
    _, task = begin(inputs_for(asked(base=base), model, tmp_path))
    gradients = []
    for looked in (False, True):
        if looked:
            task.held_out_losses(accelerator_of("fp32", task.device))
        task.model.train().zero_grad()
        learned_losses(task.model, batch_of(task.examples, task.plan.batch(0)), packed=task.packed).sum().backward()
        gradients.append({name: one.grad.clone() for name, one in task.learning.items() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == task.learning.keys()
    for name, gradient in gradients[0].items():  # those of A are nothing while B is
        assert torch.equal(gradient, gradients[1][name]) and bool(gradient.abs().sum() > 0) == (".lora_B." in name)


def test_loftq_begins_nearer_to_the_model_as_it_came(tmp_path: Path, model: Path) -> None:
    logits = {}
    ids = torch.arange(40)[None]
    for init in ("default", "loftq"):
        prepared, task = begin(inputs_for(asked(init=init, rank=32, alpha=7.0), model, tmp_path / init))
        logits[init] = task.model.eval()(input_ids=ids).logits.detach()
    expected = prepared.load(model)(input_ids=ids).logits
    apart = {init: float((each - expected).square().mean().sqrt()) for init, each in logits.items()}
    assert 0 < apart["loftq"] < 0.8 * apart["default"]


@pytest.mark.parametrize("step", [{"init": "loftq"}, {"base": "gptq"}], ids=["loftq", "gptq"])
def test_another_attempt_goes_on_to_the_same_bits(tmp_path: Path, model: Path, step: dict[str, Any]) -> None:
    _, whole = go_on(inputs_for(asked(**step), model, tmp_path / "whole"))
    inputs = inputs_for(asked(**step), model, tmp_path / "again")

    class Ended(Exception):
        """The process went away."""

    class Ending(Heard):
        def advance(self, done: int, total: int, unit: str) -> None:
            if (done, unit) == (7, "steps"):
                raise Ended

    with pytest.raises(Ended):
        go_on(dataclasses.replace(inputs, snapshot_seconds=0.0), Ending())
    _, story = go_on(inputs)
    assert story.resumed == [6] and seen(story) == seen(whole)


def test_layers_that_bitsandbytes_can_t_compute_are_refused_from_the_config_alone(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(FormatUnfit, match="take base int8") as refused:
        check(asked(), tmp_path)
    assert refused.value.param == "steps.0.base"
    assert check(asked(base="int8"), tmp_path).linears == 7


@pytest.mark.parametrize(
    ("family", "changes", "step", "error", "words", "param"),
    [
        ("gpt2", {}, {}, FormatUnfit, "gptq can't hold gpt2 models: take base nf4 or int8", "steps.0.base"),
        ("qwen2_moe", {}, {}, FormatUnfit, "gptq can't hold qwen2_moe models", "steps.0.base"),
        ("llama", {"intermediate_size": 100}, {}, FormatUnfit, "a multiple of 8.*take base int8", "steps.0.base"),
        (
            "llama",
            {"intermediate_size": 160},
            {"group_size": 128},
            GroupSizeIndivisible,
            "group_size 128 doesn't",
            "steps.0.group_size",
        ),
    ],
    ids=["transposed", "experts", "words", "groups"],
)
def test_layers_that_gptq_can_t_hold_are_refused_from_the_config_alone(
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
    step: dict[str, Any],
    error: type[FormatUnfit],
    words: str,
    param: str,
) -> None:
    config = json.loads((FAMILIES[family](tmp_path / "model") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(error, match=words) as refused:
        check(asked(base="gptq", **step), tmp_path)
    assert refused.value.param == param
