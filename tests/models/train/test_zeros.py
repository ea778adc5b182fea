"""Zeros of a model that was pruned are zeros after it was trained, whatever trains it, in a row of steps too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from models.files.checkpoint import open_model
from models.formats import layout
from models.pipeline import run
from models.train.zeros import kept_zeros
from squeeze.errors import CompressionBug
from squeeze.objects import Stage
from squeeze.reports.report import Report
from squeeze.specs.job_spec import JobSpec
from tests.models.engine_parts import frame_of
from tests.models.job_parts import Heard, digests, inputs_of
from tests.models.test_rounds import Stopped, Torn
from tests.models.tiny import FAMILIES
from tests.models.train.parts import QUICK, begin, go_on, inputs_for, kinds, spec_of, sums, written

PRUNE = {"kind": "prune", "method": "sparsegpt", "pattern": "2:4"}
FULL = {"kind": "finetune", "method": "full"} | QUICK
LOGITS = {"kind": "distill", "method": "logits", "steps": 2, "batch_size": 2}


def pruned(model: Path) -> Path:
    """With half of the weights of its linears zero, drawn."""
    dice = torch.Generator().manual_seed(0)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor[torch.rand(tensor.shape, generator=dice) < 0.5] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"ema": 0.9},
        {"optimizer": "galore", "projection_rank": 8},
        {"optimizer": "badam", "block_steps": 2, "weight_decay": 0.1},
        {"optimizer": "adamw8bit"},
        {"method": "last_layers", "layers": 1},
    ],
)
def test_zeros_stay_and_everything_else_learns(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = pruned(FAMILIES["llama"](tmp_path / "model"))
    inputs = inputs_for(spec_of({"method": "full"} | fields), model, tmp_path / "room")
    _, task = begin(inputs)
    assert len(task.zeros) == (7 if "layers" in fields else 14)
    before = {name: one.detach().clone() for name, one in task.learning.items()}
    task, _ = go_on(inputs)
    for name, places in task.zeros.items():
        after = task.learning[name].detach()
        assert (after[places] == 0).all() and (after[~places] != before[name][~places]).float().mean() > 0.9


def test_a_dense_model_has_nothing_to_keep(tmp_path: Path) -> None:
    _, task = begin(inputs_for(spec_of({"method": "full"}), FAMILIES["llama"](tmp_path / "model"), tmp_path / "room"))
    assert not task.zeros


def test_the_result_is_counted_and_a_lost_zero_is_a_bug(tmp_path: Path) -> None:
    model = pruned(FAMILIES["llama"](tmp_path / "model"))
    source = open_model(model)
    weights = [source.tensor(f"{site.name}.weight") for n in range(2) for site in frame_of(model).sites(n)]
    assert kept_zeros(source, model) == sum(int((one == 0).sum()) for one in weights)
    with pytest.raises(CompressionBug, match="fewer zeros"):
        kept_zeros(source, FAMILIES["llama"](tmp_path / "dense"))


def test_an_adapter_behind_zeros_is_refused_with_what_keeps_them() -> None:
    steps = [PRUNE, {"kind": "finetune", "method": "lora"}]
    with pytest.raises(ValidationError, match="`full`, `last_layers` and distillations keep zeros"):
        JobSpec.model_validate({"model": "org/model", "steps": steps, "data": {"source": "file-abcdefgh"}})


def chain(*steps: dict[str, Any]) -> JobSpec:
    data = {"source": "file-abcdefgh", "samples": 8, "sequence_length": 64}
    return JobSpec.model_validate({"model": "org/model", "steps": steps, "data": data, "evaluation": {"samples": 2}})


@pytest.mark.slow
@pytest.mark.parametrize("training", [FULL, LOGITS])
def test_pruned_then_trained_then_quantized_ends_with_the_pattern(tmp_path: Path, training: dict[str, Any]) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    rows = written(tmp_path / "rows.jsonl", kinds() if training is LOGITS else sums())
    spec = chain(PRUNE, training, {"kind": "quantize", "method": "gptq", "group_size": 32})
    with pytest.raises(Torn):
        run(inputs_of(spec, model, rows, tmp_path), Stopped(Stage.training, 1))
    outcome = run(inputs_of(spec, model, rows, tmp_path), Heard())
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    first = report.rounds[0].sparsity
    assert first is not None and report.training is not None and report.training.zeros_kept == first.zeros
    assert all(layer.zeros_kept == 1.0 for block in report.blocks for layer in block.layers)
    read = layout("compressed-tensors").read(outcome.directories["compressed-tensors"], "model.layers.1.mlp.up_proj")
    assert int((read.dequantize(torch.float32).view(-1, 4) == 0).sum(dim=1).min()) == 2
    assert (report.training.distillation is not None) == (training is LOGITS)
    quiet = run(inputs_of(spec, model, rows, tmp_path / "quiet"), Heard())
    assert digests(tmp_path / "out") == digests(tmp_path / "quiet" / "out") and quiet.report.quality == report.quality
