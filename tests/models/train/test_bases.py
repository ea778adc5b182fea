"""The base that GPTQ rounds for adapters: on which tokens, to which codes, and what another attempt does."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models.job import Inputs
from models.progress import Silent
from models.resources import Clock
from models.streaming import engine
from models.streaming.frame import Frame
from models.train.bases import Base, rounded_base
from models.train.prepare import prepare
from squeeze.errors import DataUnusable
from squeeze.objects import Stage
from squeeze.steps.finetuning import QLoRA
from squeeze.steps.quantization import GPTQ
from tests.models.job_parts import Heard, digests
from tests.models.tiny import FAMILIES
from tests.models.train.parts import inputs_for, spec_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


def asked(model: Path, room: Path, rows: list[Any] | None = None, **changes: Any) -> Inputs:
    return inputs_for(spec_of({"method": "qlora", "rank": 4, "base": "gptq"}, **changes), model, room, rows)


def rounded(inputs: Inputs, heard: Heard | None = None) -> Base:
    step = inputs.spec.steps[0]
    assert isinstance(step, QLoRA)
    base = rounded_base(prepare(inputs, step), inputs, Clock(), heard or Heard())
    assert base is not None
    return base


def test_it_is_what_gptq_makes_of_the_training_examples_and_is_measured_on_those_held_out(
    tmp_path: Path, model: Path
) -> None:
    inputs, heard = asked(model, tmp_path), Heard()
    prepared, base = prepare(inputs, inputs.spec.steps[0]), rounded(inputs, heard)  # type: ignore[arg-type] # it trains
    assert heard.stages == [Stage.calibrating, Stage.compressing, Stage.evaluating]
    train, told = prepared.split.train, base.calibration
    assert (told.origin, told.sequence_length, told.sequences) == ("file-abcdefgh", 48, len(train.ids) // 48)
    examples = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.cat([train.one(number)[0] for number in examples])[: told.tokens].view(-1, 48).long()
    frame = Frame(prepared.source, torch.float32, torch.device("cpu"))
    step = GPTQ(method="gptq", group_size=128)
    expected = engine.quantize(frame, step, ids, None, tmp_path / "expected", "", Silent()).model
    assert base.codes.sites.keys() == expected.sites.keys() and base.codes.bits_per_weight == 4.125
    for name in expected.sites:
        for part in ("codes", "scale"):
            assert torch.equal(base.codes.part(name, part), expected.part(name, part))
    assert base.quality is not None and base.quality.text.tokens <= len(prepared.held_out.ids)
    assert base.quality.divergence_nats is not None and 0 < base.quality.divergence_nats < 0.1
    assert [layer.bits for block in base.blocks for layer in block.layers] == [4] * 14


def test_another_attempt_finds_it_and_on_another_disk_makes_the_same(tmp_path: Path, model: Path) -> None:
    inputs = asked(model, tmp_path)
    first, heard = rounded(inputs), Heard()
    files = digests(first.codes.directory)
    assert rounded(inputs, heard).quality == first.quality
    assert any("going on after block 2 of 2" in message for message in heard.messages)
    shutil.rmtree(inputs.work)
    again = rounded(inputs)
    assert {name: digests(again.codes.directory)[name] for name in files if name.startswith("block")} == {
        name: each for name, each in files.items() if name.startswith("block")
    }


def test_fewer_tokens_than_asked_for_make_fewer_sequences_and_far_fewer_are_refused(
    tmp_path: Path, model: Path
) -> None:
    nothing = {"perplexity": False, "divergence": False}
    base = rounded(asked(model, tmp_path / "few", data={"source": "file-abcdefgh", "samples": 3}, evaluation=nothing))
    assert base.calibration.sequences <= 3 and base.quality is None
    assert any("calibration tokens are few" in warning for warning in base.warnings)
    with pytest.raises(DataUnusable, match="at least 16") as refused:
        rounded(asked(model, tmp_path / "fewest", [{"text": "a"}, {"text": "b"}]))
    assert refused.value.param == "data.source"
