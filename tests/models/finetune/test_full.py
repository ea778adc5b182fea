"""Training of the model's own weights: what learns, and that what is written is what was trained."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.finetune import full, last_layers
from models.pipeline import check
from models.train.whole import write_trained
from squeeze.errors import ModelMalformed
from squeeze.steps.finetuning import Full, LastLayers
from tests.models.engine_parts import frame_of
from tests.models.tiny import FAMILIES
from tests.models.train.parts import spec_of


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_trained_model_is_written_as_it_was_loaded(tmp_path: Path, family: str) -> None:
    path = FAMILIES[family](tmp_path / "model")
    model = full.finetune(AutoModelForCausalLM.from_pretrained(path, dtype="auto"), Full(method="full"), [])
    assert all(one.requires_grad and one.dtype == torch.float32 for one in model.parameters())
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.01)
    ids = torch.arange(20)[None]
    trained = model(input_ids=ids).logits
    write_trained(model, open_model(path), tmp_path / "out")
    rounded = model.float()(input_ids=ids).logits
    torch.testing.assert_close(rounded, trained, rtol=0, atol=0.1)
    assert open_model(tmp_path / "out").names() == open_model(path).names()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(loaded(input_ids=ids).logits, rounded)


def test_the_last_blocks_learn_with_what_follows_them(tmp_path: Path) -> None:
    path, step = FAMILIES["llama"](tmp_path / "model"), LastLayers(method="last_layers", layers=1)
    names = [site.name for site in last_layers.sites_of(frame_of(path), step)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).requires_grad_(False)
    last_layers.finetune(model, step, names)
    learning = {name for name, one in model.named_parameters() if one.requires_grad}
    assert {one.rpartition(".")[0] for one in learning} >= {*names, "model.norm"}
    assert all(name.startswith(("model.layers.1.", "model.norm.", "lm_head.")) for name in learning)
    assert "model.embed_tokens.weight" not in learning


def test_more_blocks_than_there_are_are_refused(tmp_path: Path) -> None:
    spec = spec_of({"method": "last_layers", "layers": 3})
    with pytest.raises(ModelMalformed, match="has 2 decoder blocks, not 3") as refused:
        check(spec, FAMILIES["llama"](tmp_path / "model"))
    assert refused.value.param == "steps.0.layers"
