"""Factors load in peft as they were written, and multiplied into weights and biases they compute the same."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.finetune import ia3, peft_adapter
from models.train.merging import write_merged
from squeeze.shapes.adapters import PREFIX
from squeeze.steps.finetuning import IA3
from tests.models.engine_parts import frame_of
from tests.models.job_parts import Heard
from tests.models.tiny import FAMILIES, VOCABULARY


# gpt2 has biases, and c_proj twice; of qwen2 only keys and values have biases; mixtral's experts are fused
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "patterns"), [("llama", ()), ("gpt2", ()), ("gpt2", ("*",)), ("qwen2", ("*",)), ("mixtral", ())]
)
def test_what_was_learned_is_the_same_in_the_adapter_and_in_merged_weights(
    tmp_path: Path, family: str, patterns: tuple[str, ...]
) -> None:
    model, step = FAMILIES[family](tmp_path / "model"), IA3(method="ia3", target_modules=patterns)
    sites = ia3.sites_of(frame_of(model), step)
    ids = torch.randint(0, VOCABULARY, (1, 20))
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    before = source(ids).logits
    learner = ia3.finetune(source, step, [site.name for site in sites]).eval()
    torch.testing.assert_close(learner(ids).logits, before)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, parameter in source.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1)
        source.save_pretrained(tmp_path / "biased", state_dict=_plain(learner))
    after = learner(ids).logits
    assert (after - before).abs().max() > 0.1

    (tmp_path / "adapter").mkdir()
    ia3.write(learner, step, {}, tmp_path / "adapter", "org/base", "0123")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "biased", dtype=torch.float32)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, after)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["peft_type"]) == ("org/base", "IA3")

    merged = ia3.Merged(tmp_path / "adapter")
    assert sorted(merged.modules) == sorted(site.name for site in sites)
    write_merged(open_model(tmp_path / "biased"), sites, merged, tmp_path / "merged", Heard())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    spread = after.std()
    assert (plain(ids).logits - after).square().mean().sqrt() < 0.02 * spread  # rounded to 16 bits


def test_keys_values_and_the_end_of_the_feed_forward_part_get_factors(tmp_path: Path) -> None:
    for family, names in (
        ("llama", ["k_proj", "v_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj"]),
        ("mpt", ["Wqkv", "down_proj"]),
        ("opt", ["k_proj", "v_proj", "fc2"]),
    ):
        sites = ia3.sites_of(frame_of(FAMILIES[family](tmp_path / family)), IA3(method="ia3"))
        assert [peft_adapter.last(site.name) for site in sites[: len(sites) // 2]] == names


def _plain(learner: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors by its own names."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer", ""): tensor
        for name, tensor in learner.state_dict().items()
        if ".ia3_l" not in name
    }
