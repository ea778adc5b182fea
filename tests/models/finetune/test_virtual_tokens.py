"""Virtual tokens: they load in peft as they were written, and losses are of the real tokens alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from models.certifying.in_transformers import score
from models.finetune import prefix
from models.pipeline import check
from models.train.packing import UNSCORED, batch_of
from models.train.prepare import method_of
from models.train.scoring import learned_losses, logits_of, own, packs
from squeeze.errors import ArchitectureUnsupported, DataUnusable
from squeeze.steps.finetuning import Prefix
from tests.models.engine_parts import frame_of
from tests.models.tiny import FAMILIES, VOCABULARY
from tests.models.train.parts import begin, go_on, inputs_for, spec_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # as PeftModel loads
]
METHODS = ("prompt", "prefix")


# peft reads mpt's config wrong, of its own accord
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "prompt"),
        ("llama", "prefix"),
        ("gpt2", "prefix"),
        ("mpt", "prompt"),
        ("mpt", "prefix"),
        ("gemma2", "prefix"),
    ],
)
def test_what_was_learned_loads_in_peft(tmp_path: Path, family: str, method: str) -> None:
    model = FAMILIES[family](tmp_path / "model")
    prepared, task = begin(inputs_for(spec_of({"method": method, "virtual_tokens": 5}), model, tmp_path))
    (learned,) = task.learning.values()
    assert learned.dtype == torch.float32 and len(learned) == 5
    with torch.no_grad():
        learned.add_(torch.randn_like(learned))
    ids = torch.randint(0, VOCABULARY, (2, 20))
    after = task.model.eval()(input_ids=ids).logits
    (tmp_path / "adapter").mkdir()
    method_of(prepared.step).write(task.model, prepared.step, {}, tmp_path / "adapter", "org/base", "0123")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path / "adapter"
    )
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, after)


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_of_the_real_tokens_after_the_virtual_ones(tmp_path: Path, method: str) -> None:
    _, task = begin(inputs_for(spec_of({"method": method}), FAMILIES["llama"](tmp_path / "model"), tmp_path))
    batch = batch_of(task.examples, [(0,), (1,)])
    task.model.eval()
    with torch.no_grad():
        whole = logits_of(task.model, batch, packed=False)
        assert whole.shape[:2] == batch.ids.shape
        losses = learned_losses(task.model, batch, packed=False)
        # The same model on one example, whose real tokens are the last of what it sees.
        ids, learned = task.examples.one(0)
        logits = task.model(input_ids=ids[None].long()).logits[0, -len(ids) :]
        expected = F.cross_entropy(logits[:-1][learned[1:]], ids[1:][learned[1:]].long(), reduction="none")
    picked = batch.targets != UNSCORED
    torch.testing.assert_close(losses[: len(expected)], expected)
    torch.testing.assert_close(losses, F.cross_entropy(whole[picked], batch.targets[picked], reduction="none"))


@pytest.mark.parametrize("method", METHODS)
def test_examples_behind_one_another_would_see_each_other(tmp_path: Path, method: str) -> None:
    _, task = begin(inputs_for(spec_of({"method": method}), FAMILIES["llama"](tmp_path / "model"), tmp_path))
    assert not task.packed and all(len(row) == 1 for row in task.plan.rows)
    assert not packs(task.model, task.device, VOCABULARY)
    assert packs(own(task.model), task.device, VOCABULARY)


@pytest.mark.parametrize("method", METHODS)
def test_a_long_text_is_scored_in_pieces_as_it_is_whole(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, task = begin(inputs_for(spec_of({"method": method}), FAMILIES["llama"](tmp_path / "model"), tmp_path))
    ids = torch.randint(0, VOCABULARY, (40,))
    with torch.inference_mode():
        whole = score(task.model.eval(), ids, 1)
        monkeypatch.setattr("models.certifying.in_transformers.LOGIT_BYTES", 0)
        assert score(task.model, ids, 1) == pytest.approx(whole, rel=1e-5)
        logits = task.model(input_ids=ids[None]).logits[0, -40:]
        assert whole == pytest.approx(float(F.cross_entropy(logits[:-1], ids[1:])), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_from_that_of_the_model_as_it_came(tmp_path: Path, method: str) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    _, story = go_on(inputs_for(spec_of({"method": method, "learning_rate": 0.03}), model, tmp_path / "a"))
    _, other = go_on(inputs_for(spec_of({"steps": 1, "packing": False}), model, tmp_path / "b"))
    assert story.held_out[0].loss == other.held_out[0].loss
    assert story.held_out[-1].loss < 0.95 * story.held_out[0].loss


def test_virtual_tokens_take_room_of_the_context(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"](tmp_path / "model")
    positions = frame_of(model).max_positions
    assert positions is not None
    data: dict[str, Any] = {"data": {"source": "file-abcdefgh", "sequence_length": positions}}
    prepared, _ = begin(inputs_for(spec_of({"method": "prompt"}, **data), model, tmp_path))
    assert prepared.length == positions - 20
    assert f"{positions - 20} positions beside 20 virtual tokens" in prepared.split.warnings[0]
    with pytest.raises(DataUnusable, match=f"has {positions} positions"):
        check(spec_of({"method": "prefix", "virtual_tokens": positions - 1}), model)


def test_keys_and_values_that_peft_can_t_put_before_others_are_refused(tmp_path: Path) -> None:
    model = FAMILIES["deepseek_v3"](tmp_path / "model")
    with pytest.raises(ArchitectureUnsupported, match="for which peft has no prefix"):
        check(spec_of({"method": "prefix"}), model)
    with pytest.raises(ArchitectureUnsupported, match="keeps keys and values of 2 shapes"):
        prefix.finetune(AutoModelForCausalLM.from_pretrained(model), Prefix(method="prefix"), [])
    with pytest.raises(ArchitectureUnsupported, match="keeps 4 heads of keys, not the 2 it says"):
        falcon = AutoModelForCausalLM.from_pretrained(FAMILIES["falcon"](tmp_path / "falcon"))
        prefix.finetune(falcon, Prefix(method="prefix"), [])
    assert check(spec_of({"method": "prompt"}), model).linears == 0
