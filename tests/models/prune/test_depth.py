"""Depth: which blocks go, that the rest is what it was, and that a killed job goes on to the same result."""

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.pipeline import check, run
from models.prune.depth import prune
from models.texts.data import calibration_batches
from models.texts.material import read_tokenizer
from squeeze.errors import ArchitectureUnsupported, SpecInvalid
from tests.models import tiny
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.prune.slim_parts import slim, spec_of, text

BLOCKS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS, dtype=torch.bfloat16)


def test_the_least_important_blocks_go_and_of_equal_ones_the_later() -> None:
    assert prune(torch.tensor([0.9, 0.1, 0.3, 0.2, 0.5]), 3) == [1, 3]
    assert prune(torch.tensor([0.2, 0.2, 0.2, 0.2]), 2) == [3, 2]


def test_influences_are_those_of_transformers_hidden_states_and_the_least_go(tmp_path: Path, model: Path) -> None:
    heard = Heard()
    done = slim({"blocks": 3}, model, tmp_path, heard)
    ids = calibration_batches(read_tokenizer(model), text(tmp_path / "text"), None, 4, 64, 0, None).ids
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    states: list[torch.Tensor] = [whole.model.embed_tokens(ids)]
    for layer in whole.model.layers:  # what transformers calls the last hidden state has been normed
        layer.register_forward_hook(lambda _, __, output: states.append(output))
    with torch.no_grad():
        whole(input_ids=ids)
    pairs = [(x.detach().float(), y.detach().float()) for x, y in itertools.pairwise(states)]
    expected = [float((1 - torch.cosine_similarity(x, y, dim=-1)).mean()) for x, y in pairs]
    told = done.slimming
    assert told.blocks == pytest.approx(expected, rel=0.02)
    assert told.blocks is not None and told.removed == sorted(sorted(range(BLOCKS), key=told.blocks.__getitem__)[:2])
    result = AutoModelForCausalLM.from_pretrained(done.whole, dtype=torch.bfloat16)
    assert result.config.num_hidden_layers == 3
    assert sum(one.numel() for one in result.parameters()) == told.parameters_after == open_model(done.whole).parameters
    for layer, number in zip(result.model.layers, sorted(set(range(BLOCKS)) - set(told.removed)), strict=True):
        for name, weight in layer.state_dict().items():
            assert torch.equal(weight, whole.model.layers[number].state_dict()[name])
    assert done.measured is not None and (done.measured.quality.divergence_nats or 0) > 0.01
    assert told.speed_before.prompt > 0 and told.speed_after.writing > 0 and told.speed_after.prompt_tokens == 64
    assert heard.expected and set(heard.expected[0]) == {"loading", "compressing", "evaluating", "certifying"}


def test_a_share_of_the_parameters_is_met_by_as_many_blocks_as_fit(tmp_path: Path, model: Path) -> None:
    told = slim({"params_target": 0.65}, model, tmp_path).slimming
    each = (told.parameters_before - told.parameters_after) // len(told.removed)
    assert told.parameters_after <= 0.65 * told.parameters_before < told.parameters_after + each


def without(model: torch.nn.Module, gone: tuple[int, ...], ids: torch.Tensor) -> float:
    """The perplexity of a model of transformers without some of its blocks."""
    whole = model.model.layers
    model.model.layers = torch.nn.ModuleList(one for n, one in enumerate(whole) if n not in gone)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    model.model.layers = whole
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())


@pytest.mark.parametrize("iterative", [False, True])
def test_by_perplexity_those_go_without_which_transformers_loses_least(tmp_path: Path, iterative: bool) -> None:
    model = tiny.llama(tmp_path / "model", num_hidden_layers=BLOCKS)
    heard, step = Heard(), {"blocks": 3, "importance": "perplexity", "iterative": iterative}
    told = slim(step, model, tmp_path, heard).slimming
    ids = calibration_batches(read_tokenizer(model), text(tmp_path / "text"), None, 4, 64, 0, None).ids
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    alone = [without(whole, (n,), ids) for n in range(BLOCKS)]
    assert told.blocks == pytest.approx(alone, rel=1e-4)
    order = sorted(range(BLOCKS), key=alone.__getitem__)
    gone = order[:2]
    if iterative:
        both = {n: without(whole, (order[0], n), ids) for n in order[1:]}
        gone = [order[0], min(both, key=both.__getitem__)]
    assert told.removed == sorted(gone)
    assert float(told.importance.split("with all of them ")[1].split(";")[0]) == pytest.approx(
        without(whole, (), ids), rel=1e-3
    )
    assert any("judging anew" in message for message in heard.messages) == iterative


class Stopped(Exception):
    pass


class Stopping(Heard):
    """Ends the work after the third block of the first or the second walk."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns = turns

    def advance(self, done: int, total: int, unit: str) -> None:
        self.turns -= (done, unit) == (3, "blocks")
        if not self.turns:
            raise Stopped


class Dying(Heard):
    """Ends the work in the middle of a block."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes = passes

    def advance(self, done: int, total: int, unit: str) -> None:
        assert done <= total
        self.passes -= unit == "passes of a block"
        if not self.passes:
            raise Stopped


@pytest.mark.parametrize("passes", [pytest.param(13, marks=pytest.mark.slow), 25])
def test_judging_by_perplexity_goes_on_to_the_same_result(tmp_path: Path, model: Path, passes: int) -> None:
    step = {"blocks": 3, "importance": "perplexity", "iterative": True}
    with pytest.raises(Stopped):
        slim(step, model, tmp_path / "stopped", Dying(passes))
    heard = Heard()
    gone_on, quiet = slim(step, model, tmp_path / "stopped", heard), slim(step, model, tmp_path / "quiet")
    assert any("going on after block" in message for message in heard.messages)
    assert digests(gone_on.whole) == digests(quiet.whole)
    assert gone_on.slimming.blocks == quiet.slimming.blocks and gone_on.measured == quiet.measured


@pytest.mark.parametrize("turns", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_that_ended_on_its_way_goes_on_to_the_same_result(tmp_path: Path, model: Path, turns: int) -> None:
    with pytest.raises(Stopped):
        slim({"blocks": 4}, model, tmp_path / "stopped", Stopping(turns))
    heard = Heard()
    gone_on = slim({"blocks": 4}, model, tmp_path / "stopped", heard)
    assert any("going on after block" in message for message in heard.messages)
    quiet = slim({"blocks": 4}, model, tmp_path / "quiet")
    assert digests(gone_on.whole) == digests(quiet.whole)
    assert gone_on.slimming.blocks == quiet.slimming.blocks and gone_on.measured == quiet.measured
    other = slim({"blocks": 2}, model, tmp_path / "quiet")
    assert open_model(other.whole).parameters < open_model(gone_on.whole).parameters


def test_what_can_t_be_met_is_refused_from_the_config_alone_with_what_can(tmp_path: Path, model: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(SpecInvalid, match="from 1 to 4, not 5") as refused:
        check(spec_of({"blocks": 5}), tmp_path)
    assert refused.value.param == "steps.0.blocks"
    with pytest.raises(SpecInvalid, match=r"with one decoder block of 5 left, .* can be is 0\.\d+") as refused:
        check(spec_of({"params_target": 0.1}), tmp_path)
    assert refused.value.param == "steps.0.params_target"
    odd = tiny.gpt2(tmp_path / "odd", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ArchitectureUnsupported, match="depends on the number"):
        check(spec_of({"blocks": 1}), odd)
    uneven = tiny.FAMILIES["deepseek_v3"](tmp_path / "uneven")
    with pytest.raises(SpecInvalid, match="not of one size"):
        check(spec_of({"params_target": 0.6}), uneven)
    assert check(spec_of({"blocks": 1}), uneven).blocks == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ["cohere2", "gpt2", "mixtral", "qwen2_moe", "smollm3"])
def test_a_job_of_it_alone_ends_certified(tmp_path: Path, family: str) -> None:
    model = tiny.FAMILIES[family](tmp_path / "model")
    outcome = run(inputs_of(spec_of({"blocks": 1}), model, text(tmp_path / "text"), tmp_path), Heard())
    report = outcome.report
    assert set(outcome.directories) == {"safetensors"} and report.certificates[0].outcome == "passed"
    assert report.slimming is not None and report.slimming.quality is None and report.quality is not None
    assert outcome.result.compression_ratio and outcome.result.compression_ratio > 1
    assert "Made smaller" in (outcome.directories["safetensors"] / "README.md").read_text()
