"""Experts: which go, that what stays says what it said where they were not asked, and what can't be left out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.pipeline import check, run
from models.prune.experts import prune
from models.texts.data import calibration_batches
from models.texts.material import read_tokenizer
from squeeze.errors import ArchitectureUnsupported, SpecInvalid
from squeeze.shapes.mixtures import FAMILIES
from tests.models import tiny
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.prune.slim_parts import slim, spec_of, text
from tests.models.prune.test_depth import Stopped, Stopping

HALF = {"method": "experts", "params_target": 0.75}


def read(model: Path, room: Path) -> Tensor:
    """What a job in that room judges experts by, (4, 64)."""
    return calibration_batches(read_tokenizer(model), text(room / "text"), None, 4, 64, 0, None).ids


def logits(model: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(input_ids=ids).logits
    return found


def unsent(model: Path) -> Path:
    """With routers that send no token to every other expert: by a channel that is as loud in all of them."""
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(".e_score_correction_bias"):
            tensor[1::2] = -10.0
        elif name.endswith(".gate.weight"):
            tensor[:, 0] = 0.0
            tensor[1::2] = 0.0
            tensor[1::2, 0] = -1.0
        elif name.endswith("post_attention_layernorm.weight"):
            tensor[0] = 20.0
        elif name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
            tensor[0] = 0.0
        elif name.endswith("embed_tokens.weight"):
            tensor[:, 0] = 2.0
    save_file(tensors, file, metadata={"format": "pt"})
    return model


def test_as_many_stay_of_each_group_the_most_important_in_order() -> None:
    assert prune(torch.tensor([0.5, 0.1, 0.9, 0.5]), 2, 1).tolist() == [0, 2]
    assert prune(torch.tensor([0.5, 0.1, 0.9, 0.7]), 2, 2).tolist() == [0, 2]


def test_importance_is_that_of_transformers_routers_and_experts(tmp_path: Path) -> None:
    model = tiny.FAMILIES["qwen3_moe"](tmp_path / "model")
    told = slim({"method": "experts", "experts": 5}, model, tmp_path).slimming
    ids = read(model, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    removed: dict[str, list[int]] = {}
    for index, layer in enumerate(whole.model.layers):

        def look(module: torch.nn.Module, given: tuple[Tensor, ...], _: object, index: int = index) -> None:
            hidden, chosen, weights = given
            scores = torch.zeros(8)
            for number in range(8):
                token, place = (chosen == number).nonzero(as_tuple=True)
                gate, up = module.gate_up_proj[number].chunk(2)
                inner = torch.nn.functional.silu(hidden[token] @ gate.T) * (hidden[token] @ up.T)
                put_out = (inner @ module.down_proj[number].T).norm(dim=-1)
                scores[number] = (weights[token, place] * put_out).mean()
            removed[str(index)] = sorted(scores.argsort()[:3].tolist())

        layer.mlp.experts.register_forward_hook(look)
    with torch.no_grad():
        whole(input_ids=ids)
    assert told.experts is not None and told.experts.removed == removed
    assert (told.experts.before, told.experts.after, told.experts.chosen_after) == (8, 5, 2)


@pytest.mark.parametrize(
    "family",
    [one if one in ("mixtral", "deepseek_v3") else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES],
)
def test_experts_that_no_token_goes_to_go_and_nothing_changes(tmp_path: Path, family: str) -> None:
    normed = {} if family in ("deepseek_v2", "mixtral") else {"norm_topk_prob": True}
    model = unsent(tiny.FAMILIES[family](tmp_path / "model", **normed))
    half = 2 if family == "mixtral" else 4
    done = slim({"method": "experts", "experts": half}, model, tmp_path / "room")
    told = done.slimming
    assert told.experts is not None and told.experts.before == 2 * half and told.experts.rerouted == 0
    ids = read(model, tmp_path / "room")
    if family != "deepseek_v2":  # which weighs an expert by its share among all, those that are gone too
        torch.testing.assert_close(logits(done.whole, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
    result = AutoModelForCausalLM.from_pretrained(done.whole)
    stored = [*result.parameters(), *(one for name, one in result.named_buffers() if name.endswith("_bias"))]
    assert sum(one.numel() for one in stored) == told.parameters_after == open_model(done.whole).parameters


@pytest.mark.slow
def test_experts_of_one_tensor_are_taken_apart(tmp_path: Path) -> None:
    model = tiny.save("mixtral", tmp_path / "model", fused=True)
    apart = tiny.save("mixtral", tmp_path / "apart")
    step = {"method": "experts", "experts": 2}
    one, two = (slim(step, each, each.with_name(f"{each.name}-room")).whole for each in (model, apart))
    ids = read(model, tmp_path)
    assert torch.equal(logits(one, ids), logits(two, ids))


def test_a_token_goes_to_no_more_than_are_left(tmp_path: Path) -> None:
    told = slim({"method": "experts", "experts": 1}, tiny.FAMILIES["mixtral"](tmp_path / "model"), tmp_path / "room")
    assert told.slimming.experts is not None and told.slimming.experts.chosen_after == 1
    assert AutoModelForCausalLM.from_pretrained(told.whole).config.num_experts_per_tok == 1


@pytest.mark.slow
def test_a_job_that_ended_on_its_way_goes_on_to_the_same_result(tmp_path: Path) -> None:
    model = tiny.FAMILIES["olmoe"](tmp_path / "model", num_hidden_layers=4)
    with pytest.raises(Stopped):
        slim(HALF, model, tmp_path / "stopped", Stopping(1))
    gone_on, quiet = slim(HALF, model, tmp_path / "stopped"), slim(HALF, model, tmp_path / "quiet")
    assert digests(gone_on.whole) == digests(quiet.whole) and gone_on.measured == quiet.measured


def test_what_can_t_be_met_is_refused_from_the_config_alone_with_what_can(tmp_path: Path) -> None:
    for family in ("deepseek_v3", "mixtral"):
        tiny.FAMILIES[family](tmp_path / family)
        (tmp_path / family / "model.safetensors").unlink()
    for family, field, asked, words in (
        ("mixtral", "experts", 4, "from 1 to 3, not 4"),
        ("mixtral", "params_target", 0.3, r"can be is 0\.6"),
        ("deepseek_v3", "experts", 2, "from 4 to 6 in steps of 2, not 2"),
        ("deepseek_v3", "experts", 5, "experts=5 can't be, 4 or 6 can"),
    ):
        with pytest.raises(SpecInvalid, match=words) as refused:
            check(spec_of({"method": "experts", field: asked}), tmp_path / family)
        assert refused.value.param == f"steps.0.{field}"
    with pytest.raises(ArchitectureUnsupported, match="a llama without experts"):
        check(spec_of(HALF), tiny.llama(tmp_path / "llama"))
    rounded = {"kind": "quantize", "method": "rtn", "group_size": 32}
    facts = check(spec_of({"method": "experts", "experts": 2}, rounded), tmp_path / "mixtral")
    assert facts.linears == tiny.LAYERS * (4 + 2 * 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_job_of_it_alone_ends_certified(tmp_path: Path, family: str) -> None:
    model = tiny.FAMILIES[family](tmp_path / "model")
    report = run(inputs_of(spec_of(HALF), model, text(tmp_path / "text"), tmp_path), Heard()).report
    assert report.certificates[0].outcome == "passed" and report.slimming is not None
    assert report.slimming.experts is not None and 0 < report.slimming.experts.rerouted < 1


@pytest.mark.slow
def test_what_has_fewer_experts_is_quantized_in_the_same_job(tmp_path: Path) -> None:
    model = tiny.FAMILIES["qwen3_moe"](tmp_path / "model", dtype=torch.bfloat16)
    rounded = {"kind": "quantize", "method": "gptq", "group_size": 32}
    report = run(inputs_of(spec_of(HALF, rounded), model, text(tmp_path / "text"), tmp_path), Heard()).report
    assert report.certificates[0].outcome == "passed" and report.slimming is not None
