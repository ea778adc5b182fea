"""Gradient importance: that of transformers' whole model, gone on with where it ended, and what it makes of a model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.progress import Silent
from models.prune.slimming import gradient
from models.prune.slimming.looking import Looking
from models.streaming.frame import Frame
from models.texts.data import calibration_batches
from models.texts.material import read_tokenizer
from tests.models import tiny
from tests.models.job_parts import Heard, digests
from tests.models.prune.slim_parts import slim, text
from tests.models.prune.test_depth import Stopped


def test_gradients_are_those_of_the_whole_model_in_transformers(tmp_path: Path) -> None:
    model = tiny.FAMILIES["qwen2"](tmp_path / "model", num_hidden_layers=3)
    looking = looking_at(model, tmp_path)
    sums = gradient.looked(looking).sums
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for ids in looking.ids:
        logits = whole(input_ids=ids[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    changes = {name: (one * one.grad).detach().abs() for name, one in whole.named_parameters()}
    for index in range(3):
        own = {name.split(".", 3)[-1]: one for name, one in changes.items() if f"layers.{index}." in name}
        neurons = (
            own["mlp.gate_proj.weight"].sum(1) + own["mlp.up_proj.weight"].sum(1) + own["mlp.down_proj.weight"].sum(0)
        )
        torch.testing.assert_close(sums[gradient.NEURONS][index].float(), neurons, rtol=1e-3, atol=1e-5)
        rows = [own[f"self_attn.{name}_proj.weight"].sum(1) + own[f"self_attn.{name}_proj.bias"] for name in "qkv"]
        heads = [one.view(2, -1).sum(1) for one in (*rows, own["self_attn.o_proj.weight"].sum(0))]
        torch.testing.assert_close(sums[gradient.GROUPS][index].float(), sum(heads), rtol=1e-3, atol=1e-5)
    channels = torch.zeros(tiny.HIDDEN)
    for name, one in changes.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            channels += one.sum(1)
        elif not name.endswith("bias"):
            channels += one.sum(0) if one.ndim == 2 else one
    torch.testing.assert_close(sums[gradient.CHANNELS].float(), channels, rtol=1e-3, atol=1e-5)


def looking_at(model: Path, room: Path) -> Looking:
    ids = calibration_batches(read_tokenizer(model), text(room / "text"), None, 4, 64, 0, None).ids
    frame = Frame(open_model(model), torch.float32, torch.device("cpu"))
    return Looking(frame, ids, None, room / "looked", "mark", Silent(), 0.0, 0)


class Interrupted(Heard):
    """Ends the work after so many steps forwards and back."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def advance(self, done: int, total: int, unit: str) -> None:
        if (done, unit) == (self.steps, "steps forwards and back"):
            raise Stopped


@pytest.mark.parametrize("steps", [3, 8, pytest.param(11, marks=pytest.mark.slow)])
def test_gradients_that_ended_on_their_way_go_on_to_the_same_result(tmp_path: Path, steps: int) -> None:
    looking = looking_at(tiny.llama(tmp_path / "model", num_hidden_layers=4), tmp_path)
    quiet = gradient.looked(replace(looking, directory=tmp_path / "quiet")).sums
    with pytest.raises(Stopped):
        gradient.looked(replace(looking, notify=Interrupted(steps)))
    heard = Heard()
    gone_on = gradient.looked(replace(looking, notify=heard)).sums
    assert any(f"going on after {steps} of 11 steps" in message for message in heard.messages) == (steps < 11)
    assert gone_on.keys() == quiet.keys() and all(torch.equal(gone_on[name], quiet[name]) for name in quiet)


def test_by_gradient_other_neurons_go_and_the_report_says_so(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model")
    step = {"method": "width", "params_target": 0.6, "importance": "gradient"}
    done = slim(step, model, tmp_path / "room")
    assert "∂L/∂w" in done.slimming.importance and done.slimming.parameters_after <= 0.6 * open_model(model).parameters
    other = slim(step | {"importance": "activation"}, model, tmp_path / "other")
    assert done.slimming.widths == other.slimming.widths and digests(done.whole) != digests(other.whole)
