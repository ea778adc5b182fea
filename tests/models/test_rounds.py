"""Rounds of pruning and training as one job: what each makes goes on, none is done twice, all are told of."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.pipeline import check, run
from squeeze.errors import SpecInvalid
from squeeze.objects import Stage
from squeeze.specs.job_spec import JobSpec
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.prune.slim_parts import text
from tests.models.tiny import FAMILIES
from tests.models.train.parts import kinds, written

DEPTH = {"kind": "prune", "method": "depth"}
LOGITS = {"kind": "distill", "method": "logits", "steps": 2, "batch_size": 2}
GPTQ = {"kind": "quantize", "method": "gptq", "group_size": 32}


def spec_of(*steps: Mapping[str, Any]) -> JobSpec:
    data = {"source": "file-abcdefgh", "samples": 4, "sequence_length": 64}
    return JobSpec.model_validate(
        {"model": "org/model", "steps": steps, "data": data, "evaluation": {"samples": 2}, "formats": ["safetensors"]}
        if steps[-1]["kind"] != "quantize"
        else {"model": "org/model", "steps": steps, "data": data, "evaluation": {"samples": 2}}
    )


class Torn(Exception):
    pass


class Stopped(Heard):
    """Ends the attempt when the work enters a stage for so many times."""

    def __init__(self, stage: Stage, times: int) -> None:
        super().__init__()
        self._stage, self._left = stage, times

    def stage(self, stage: Stage) -> None:
        super().stage(stage)
        self._left -= stage is self._stage
        if not self._left:
            raise Torn


@contextmanager
def untouched(directory: Path) -> Iterator[None]:
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    yield
    assert before and {path: path.stat().st_mtime_ns for path in before} == before


def test_pruning_and_distilling_in_turn_ends_in_one_model_that_the_original_taught(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=4)
    steps = [DEPTH | {"blocks": 3}, LOGITS, DEPTH | {"blocks": 2}, LOGITS, GPTQ]
    inputs = inputs_of(spec_of(*steps), model, text(tmp_path / "text"), tmp_path / "room")
    inputs.work.mkdir()
    with pytest.raises(Torn):
        run(inputs, Stopped(Stage.training, 2))
    with untouched(inputs.work / "round-0" / "out"):
        heard = Heard()
        outcome = run(inputs, heard)
    assert any("steps 0 to 1 was done" in message for message in heard.messages)
    report = outcome.report
    assert [one.steps for one in report.rounds] == [[0, 1]] and len(report.recipe) == 5
    first = report.rounds[0]
    assert first.slimming is not None and first.slimming.removed and first.training is not None
    assert report.slimming is not None and report.slimming.parameters_before == first.parameters
    assert report.training is not None and report.training.distillation is not None
    assert report.training.distillation.teacher_parameters == open_model(model).parameters
    assert report.source.parameters == open_model(model).parameters
    assert report.spent.seconds["training"] > first.seconds["training"]
    config = AutoModelForCausalLM.from_pretrained(outcome.directories["compressed-tensors"]).config
    assert config.num_hidden_layers == 2
    assert all(one.outcome != "failed" for one in report.certificates) and report.certificates


@pytest.mark.slow
def test_domains_of_every_round_are_held_against_the_model_before_the_first(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=4)
    step = {"steps": 4, "batch_size": 2, "domain_column": "kind", "evaluate_every": 2, "learning_rate": 1e-3}
    full, logits = step | {"kind": "finetune", "method": "full"}, step | {"kind": "distill", "method": "logits"}
    spec = spec_of(DEPTH | {"blocks": 3}, full, DEPTH | {"blocks": 2}, logits, DEPTH | {"blocks": 1}, full)
    inputs = inputs_of(spec, model, written(tmp_path / "rows", kinds()), tmp_path / "room")
    inputs.work.mkdir()
    report = run(inputs, Heard()).report
    told = [one.training for one in (*report.rounds, report)]
    references = [[one.loss_reference for one in each.domains] for each in told if each is not None]
    assert len(references) == 3 and len(references[0]) == 3
    for other in references[1:]:
        assert other == pytest.approx(references[0], rel=1e-6)


@pytest.mark.slow
def test_a_job_in_rounds_makes_what_its_rounds_make_as_jobs_of_their_own(tmp_path: Path) -> None:
    model, words = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=4), text(tmp_path / "text")
    width = {"kind": "prune", "method": "width", "intermediate_size": 128}

    def made(name: str, source: Path, *steps: Mapping[str, Any]) -> Path:
        inputs = inputs_of(spec_of(*steps), source, words, tmp_path / name)
        inputs.work.mkdir()
        return run(inputs, Heard()).directories["safetensors"]

    together = made("both", model, DEPTH | {"blocks": 3}, width)
    apart = made("second", made("first", model, DEPTH | {"blocks": 3}), width)
    assert digests(together) == digests(apart)


def test_what_a_later_round_can_t_meet_is_refused_by_its_own_number(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=4)
    spec = spec_of(DEPTH | {"blocks": 3}, LOGITS, {"kind": "prune", "method": "width", "heads": 64})
    with pytest.raises(SpecInvalid) as refused:
        check(spec, model)
    assert refused.value.param == "steps.2.heads"
