"""Adapters load in peft as they were written, and merged weights compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.finetune import lora
from models.streaming.frame import Frame
from squeeze.errors import ModelMalformed
from squeeze.steps.finetuning import LoRA
from tests.models.tiny import FAMILIES, VOCABULARY

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa and rslora": {"init": "pissa", "rslora": True},
}


def frame_of(model: Path) -> Frame:
    return Frame(open_model(model), torch.float32, torch.device("cpu"))


def loaded(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 keeps its weights with the inputs first
@pytest.mark.parametrize("way", WAYS)
def test_what_was_learned_is_the_same_in_the_adapter_and_in_merged_weights(
    tmp_path: Path, family: str, way: str
) -> None:
    model, step = FAMILIES[family](tmp_path / "model"), LoRA(method="lora", rank=3, alpha=5.0, **WAYS[way])
    sites = lora.sites_of(frame_of(model), step)
    ids = torch.randint(0, VOCABULARY, (1, 20))
    torch.manual_seed(0)
    source = loaded(model)
    before = source(ids).logits
    learner = lora.finetune(source, step, [site.name for site in sites]).eval()
    initial = lora.adapter_of(learner)
    torch.testing.assert_close(learner(ids).logits, before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32
                parameter.add_(0.05 * torch.randn_like(parameter))
    after = learner(ids).logits
    assert (after - before).abs().max() > 0.1

    (tmp_path / "adapter").mkdir()
    lora.write(learner, step, initial, tmp_path / "adapter", "org/base", "0123")
    again = PeftModel.from_pretrained(loaded(model), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, after, atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "0123")
    assert config["r"] == (6 if "pissa" in way else 3)

    merged, plain = lora.Merged(tmp_path / "adapter"), loaded(model)
    assert sorted(merged.modules) == sorted(site.name for site in sites)
    with torch.no_grad():
        for site in sites:
            weight = plain.get_submodule(site.name).weight
            weight.copy_(merged.weight(site.name, weight, transposed=site.transposed))
    torch.testing.assert_close(plain(ids).logits, after, atol=1e-4, rtol=1e-4)


def test_patterns_choose_layers_and_one_that_matches_none_is_told(tmp_path: Path) -> None:
    frame = frame_of(FAMILIES["llama"](tmp_path / "model"))
    assert len(lora.sites_of(frame, LoRA(method="lora"))) == 14
    some = lora.sites_of(frame, LoRA(method="lora", target_modules=("*.q_proj", "model.layers.1.*.v_proj")))
    assert [site.name.removeprefix("model.layers.") for site in some] == [
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.self_attn.v_proj",
    ]
    with pytest.raises(ModelMalformed, match=r"'\*\.wq' matches no linear layer.*q_proj") as refused:
        lora.sites_of(frame, LoRA(method="lora", target_modules=("*.wq",)))
    assert refused.value.param == "target_modules"


def test_fused_experts_get_no_adapter(tmp_path: Path) -> None:
    sites = lora.sites_of(frame_of(FAMILIES["mixtral"](tmp_path / "model")), LoRA(method="lora"))
    assert {site.name.rpartition(".")[2] for site in sites} == {"q_proj", "k_proj", "v_proj", "o_proj"}
