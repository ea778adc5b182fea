"""What plans count of a training is what the training has: parameters that learn, tokens, operations of each stage."""

from pathlib import Path
from typing import Any

import pytest

from models.resources import Clock
from models.train.counting import work_of
from models.train.job import trained
from models.work import ahead, summed
from squeeze.costs.trainable import learned
from squeeze.costs.work import counted
from squeeze.steps.distillation import Distill
from squeeze.steps.finetuning import Finetune
from tests.models.distill.parts import inputs_of as distilling_inputs
from tests.models.job_parts import Heard
from tests.models.job_parts import spec_of as quantizing
from tests.models.tiny import FAMILIES
from tests.models.train.parts import begin, inputs_for, spec_of

pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize(
    "step",
    [
        {},
        {"dora": True, "target_modules": ["*.o_proj", "*.c_proj"]},
        {"method": "qlora", "rank": 3},
        {"method": "ia3"},
        {"method": "prompt", "virtual_tokens": 3},
        {"method": "prefix", "virtual_tokens": 3},
        {"method": "full"},
        {"method": "last_layers", "layers": 1},
    ],
    ids=lambda step: "-".join(map(str, step.values())) or "lora",
)
def test_the_parameters_that_learn_are_known_from_the_headers(
    tmp_path: Path, family: str, step: dict[str, Any]
) -> None:
    patterns = step.get("target_modules")
    if patterns:
        step = step | {"target_modules": [pattern for pattern in patterns if (family == "gpt2") == ("c_" in pattern)]}
    prepared, task = begin(inputs_for(spec_of(step), FAMILIES[family](tmp_path / "model"), tmp_path))
    training, source = prepared.step, prepared.source
    assert isinstance(training, Finetune)
    told = learned(training, source.config, {name: entry.shape for name, entry in source.entries.items()})
    assert told.parameters == sum(one.numel() for one in task.learning.values())


def test_the_work_is_of_the_tokens_that_there_are_and_of_the_step_that_follows(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    spec = spec_of({"merge": True, "evaluate_every": 5})
    prepared, task = begin(inputs_for(spec, model, tmp_path / "alone"))
    work = work_of(prepared, task.plan, spec)
    assert list(work) == ["loading", "training", "exporting", "certifying"]
    assert "loading" not in ahead(work, prepared.source, spec)
    twice = spec_of({"merge": True, "evaluate_every": 5, "steps": 24})
    again, more = begin(inputs_for(twice, model, tmp_path / "longer"))
    longer = work_of(again, more.plan, twice)
    assert 1.5 * work["training"] < longer["training"] < 2.0 * work["training"]

    both = spec.model_copy(update={"steps": (*spec.steps, *quantizing().steps), "formats": ("gptq",)})
    chained = work_of(prepared, task.plan, both)
    assert list(chained) == ["loading", "training", "exporting"]
    after = {stage: count.whole for stage, count in counted(prepared.source.shape(), both).items()}
    assert ahead(chained, prepared.source, both) == summed({k: v for k, v in chained.items() if k != "loading"}, after)


@pytest.mark.parametrize(
    "step",
    [{}, {"method": "hidden"}, {"method": "sequence", "new_tokens": 8}, {"method": "on_policy", "new_tokens": 4}],
    ids=lambda step: step.get("method", "logits"),
)
def test_a_distillation_counts_its_teacher_before_it_has_read_anything_and_what_is_left_afterwards(
    tmp_path: Path, step: dict[str, Any]
) -> None:
    model = FAMILIES["llama"](tmp_path / "model", num_hidden_layers=4)
    inputs, heard = distilling_inputs(step | {"steps": 2}, model, tmp_path), Heard()
    training = inputs.spec.steps[0]
    assert isinstance(training, Distill)
    clock = Clock()
    done = trained(inputs, training, tmp_path / "adapter", tmp_path / "whole", clock, heard)
    assert list(done.work) == ["loading", "teaching", "training", "exporting", "certifying"]
    assert set(clock.seconds) == {"loading", "teaching", "training", "exporting"}
    told = list(heard.expected)
    assert "teaching" in told[0] and "loading" not in told[0]
    assert set(told[-1]) == {"training", "exporting", "certifying"} and told[-1]["training"] == done.work["training"]
    source = done.prepared.source
    known = learned(training, source.config, {name: entry.shape for name, entry in source.entries.items()})
    assert known.parameters == done.training.trainable_parameters
