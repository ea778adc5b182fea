"""Width: what goes is what puts out least, and what stays says what it said when the rest was silent."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.pipeline import check, run
from models.prune.width import prune
from squeeze.errors import ArchitectureUnsupported, GroupSizeIndivisible, SpecInvalid
from squeeze.shapes.widths import FAMILIES
from tests.models import tiny
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.prune.slim_parts import slim, spec_of, text
from tests.models.prune.test_depth import Stopped, Stopping

IDS = torch.arange(3, 40)[None]
SMALL = {"method": "width", "intermediate_size": 128, "heads": 2}


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=IDS).logits
    return found


def silenced(model: Path) -> Path:
    """With half of the neurons and one group of heads putting out nothing, in other places in each block."""
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    for block in range(tiny.LAYERS):
        tensors[f"model.layers.{block}.mlp.down_proj.weight"][:, block::2] = 0
        tensors[f"model.layers.{block}.mlp.up_proj.weight"][block::2] = 0
        half = tensors[f"model.layers.{block}.self_attn.o_proj.weight"].shape[1] // 2
        tensors[f"model.layers.{block}.self_attn.o_proj.weight"][:, block * half : (block + 1) * half] = 0
        for leaf in ("weight", "bias"):
            name = f"model.layers.{block}.self_attn.v_proj.{leaf}"
            if name in tensors:
                rows = len(tensors[name]) // 2
                tensors[name][block * rows : (block + 1) * rows] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_neurons_and_heads_go_and_nothing_changes(tmp_path: Path, family: str) -> None:
    model = silenced(tiny.FAMILIES[family](tmp_path / "model"))
    heads = tiny.HEADS if FAMILIES[family].square else 2  # which there go with channels
    step = {name: size for name, size in SMALL.items() if name != "heads" or size == heads}
    done = slim(step, model, tmp_path / "room")
    torch.testing.assert_close(logits(done.whole), logits(model), rtol=1e-4, atol=1e-4)
    told = done.slimming
    assert told.widths is not None
    assert (told.widths["intermediate_size"], told.widths["num_attention_heads"]) == (128, heads)
    result = AutoModelForCausalLM.from_pretrained(done.whole)
    assert sum(one.numel() for one in result.parameters()) == told.parameters_after < told.parameters_before
    assert done.measured is not None and done.measured.quality.divergence_nats == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "granite", "llama", "tied llama"])
def test_silent_channels_go_and_norms_stay_as_loud(tmp_path: Path, family: str) -> None:
    tied = {} if family == "llama" else {"tie_word_embeddings": True}
    model = tiny.FAMILIES[family.removeprefix("tied ")](tmp_path / "model", **tied)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][:, ::4] = 0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[::4] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    done = slim({"method": "width", "hidden_size": 96}, model, tmp_path / "room")
    torch.testing.assert_close(logits(done.whole), logits(model), rtol=1e-3, atol=1e-3)
    assert AutoModelForCausalLM.from_pretrained(done.whole).config.head_dim == tiny.HIDDEN // tiny.HEADS


def test_a_family_that_llama_cpp_loads_with_as_many_channels_as_queries_stays_so(tmp_path: Path) -> None:
    model = tiny.FAMILIES["qwen2"](tmp_path / "model")
    told = slim({"method": "width", "params_target": 0.45}, model, tmp_path / "room").slimming.widths
    assert told is not None and told["num_attention_heads"] * told["head_dim"] == told["hidden_size"] == 64
    for field, asked, others in (("heads", 2, {}), ("hidden_size", 96, {}), ("heads", 2, {"hidden_size": 96})):
        with pytest.raises(SpecInvalid, match="say heads=2 with hidden_size=64") as refused:
            check(spec_of({"method": "width", field: asked} | others), model)
        assert refused.value.param == f"steps.0.{field}"
    assert check(spec_of({"method": "width", "heads": 2, "hidden_size": 64}), model).blocks == tiny.LAYERS


def test_the_most_important_places_stay_in_order() -> None:
    assert prune(torch.tensor([0.5, 0.1, 0.9, 0.5]), 2).tolist() == [0, 2]


def test_a_job_that_ended_on_its_way_goes_on_to_the_same_result(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model", num_hidden_layers=4)
    step = {"method": "width", "params_target": 0.6}
    with pytest.raises(Stopped):
        slim(step, model, tmp_path / "stopped", Stopping(1))
    gone_on, quiet = slim(step, model, tmp_path / "stopped"), slim(step, model, tmp_path / "quiet")
    assert digests(gone_on.whole) == digests(quiet.whole) and gone_on.measured == quiet.measured
    assert gone_on.slimming.parameters_after <= 0.6 * open_model(model).parameters


def test_what_can_t_be_met_is_refused_from_the_config_alone_with_what_can(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny.llama(tmp_path / "model") / "config.json").read_bytes())
    for field, asked, words in (
        ("heads", 3, "heads=3 can't be, 2 can"),
        ("heads", 64, "has 4 heads, and fewer are to stay: `heads` can only be 2 here, not 64"),
        ("intermediate_size", 256, "from 32 to 224 in steps of 32, not 256"),
        ("hidden_size", 1024, "from 32 to 96 in steps of 32, not 1024"),
        ("params_target", 0.01, "the least that params_target can be is 0.3"),
    ):
        with pytest.raises(SpecInvalid, match=words) as refused:
            check(spec_of({"method": "width", field: asked}), tmp_path)
        assert refused.value.param == f"steps.0.{field}"
    with pytest.raises(ArchitectureUnsupported, match="gpt2 can't be cut in width; gemma, gemma2"):
        check(spec_of({"method": "width", "params_target": 0.7}), tiny.gpt2(tmp_path / "gpt2"))
    rounded = {"kind": "quantize", "method": "rtn", "group_size": 64}
    assert check(spec_of(SMALL, rounded), tmp_path).linears == 7 * tiny.LAYERS
    with pytest.raises(GroupSizeIndivisible):
        check(spec_of({"method": "width", "intermediate_size": 96}, rounded), tmp_path)


@pytest.mark.slow
def test_what_was_made_narrower_is_quantized_in_the_same_job(tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model", dtype=torch.bfloat16)
    rounded = {"kind": "quantize", "method": "gptq", "group_size": 32}
    spec = spec_of({"method": "width", "params_target": 0.7}, rounded)
    report = run(inputs_of(spec, model, text(tmp_path / "text"), tmp_path), Heard()).report
    assert report.slimming is not None and report.slimming.quality is not None and report.quality is not None
    assert report.quality.perplexity_before == pytest.approx(report.slimming.quality.perplexity_after)
    assert report.source.bytes == open_model(model).weight_bytes and report.certificates[0].outcome == "passed"
    assert [step["method"] for step in report.recipe] == ["width", "gptq"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [{"blocks": 3}, {"method": "width", "params_target": 0.7}])
def test_what_was_made_smaller_learns_from_the_original_and_is_then_quantized(
    tmp_path: Path, step: dict[str, object]
) -> None:
    model = tiny.llama(tmp_path / "model", dtype=torch.bfloat16, num_hidden_layers=4)
    taught = {"kind": "distill", "method": "logits", "steps": 12, "learning_rate": 1e-3, "batch_size": 4}
    rounded = {"kind": "quantize", "method": "rtn", "group_size": 32}
    inputs = inputs_of(spec_of(step, taught, rounded), model, text(tmp_path / "text"), tmp_path)
    report = run(inputs, Heard()).report
    assert report.slimming is not None and report.training is not None and report.training.distillation is not None
    assert report.training.distillation.student_parameters == report.slimming.parameters_after
    assert report.training.distillation.teacher_parameters == report.slimming.parameters_before
    assert report.training.loss_after < report.training.loss_before
    assert set(report.training.loss_quantized) == {"compressed-tensors"}
    assert report.certificates[0].outcome == "passed"
    before = digests(inputs.out)
    run(inputs, Heard())
    assert digests(inputs.out) == before
