"""The streaming engine against transformers running the whole model at once."""

import hashlib
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.files.checkpoint import open_model
from models.measuring.evaluation import measure
from models.progress import Silent
from models.streaming import engine
from models.streaming.frame import Frame
from models.texts.data import calibration_batches, evaluation_windows
from models.weights.quantized import block_files
from squeeze.errors import ModelMalformed, NotFinite
from squeeze.steps.quantization import GPTQ, RTN
from tests.models import tiny
from tests.models.rounding import place

CPU = torch.device("cpu")


class Stopped(Exception):
    pass


class StopsAfter(Silent):
    """Ends the work the hard way once so many blocks are done."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "blocks" and done == self.blocks:
            raise Stopped


def frame_of(model, dtype=torch.float32) -> Frame:
    return Frame(open_model(model), dtype, CPU)


def texts_of(model, length=64, samples=12):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return (
        calibration_batches(tokenizer, None, None, samples, length, seed=0),
        evaluation_windows(tokenizer, None, None, True, 6, length, stride=None),
    )


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(row[None]).logits[:, :-1].float() for row in ids])


@pytest.mark.parametrize(("method", "family"), [("rtn", "llama"), *(("gptq", family) for family in tiny.KINDS)])
def test_the_figures_are_those_of_the_whole_model_with_dequantized_weights(tmp_path, family, method):
    model = tiny.FAMILIES[family](tmp_path / "model")
    frame, (calibration, windows) = frame_of(model), texts_of(model)
    step = RTN(method="rtn", group_size=32) if method == "rtn" else GPTQ(method="gptq", group_size=32)
    ids = calibration.ids if step.needs_calibration else None
    done = engine.quantize(frame, step, ids, windows, tmp_path / "work", "", Silent())
    quality = measure(frame, windows, done.activations.original, done.activations.compressed, Silent()).quality

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    targets = windows.ids[:, 1:].unsqueeze(-1)
    before = torch.log_softmax(logits_of(reference, windows.ids), -1)
    for name, site in done.model.sites.items():
        place(reference, site, done.model.codes(name).dequantize(torch.float32))
    after = torch.log_softmax(logits_of(reference, windows.ids), -1)

    assert quality.perplexity_before == pytest.approx(math.exp(-before.gather(-1, targets).mean()), rel=1e-4)
    assert quality.perplexity_after == pytest.approx(math.exp(-after.gather(-1, targets).mean()), rel=1e-4)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert quality.divergence_nats == pytest.approx(float(divergence), rel=1e-3)
    agreement = (before.argmax(-1) == after.argmax(-1)).float().mean()
    assert quality.top1_agreement == pytest.approx(float(agreement), abs=0.01)
    assert len(done.blocks) == frame.count
    assert {layer.name for block in done.blocks for layer in block.layers} == set(done.model.sites)


def test_gptq_diverges_less_than_round_to_nearest(tmp_path):
    model = tiny.FAMILIES["llama"](tmp_path / "model")
    frame, (calibration, windows) = frame_of(model), texts_of(model, samples=96)
    divergence = {}
    for step in (RTN(method="rtn", bits=3, group_size=32), GPTQ(method="gptq", bits=3, group_size=32)):
        ids = calibration.ids if step.needs_calibration else None
        done = engine.quantize(frame, step, ids, windows, tmp_path / step.method, "", Silent())
        measured = measure(frame, windows, done.activations.original, done.activations.compressed, Silent())
        divergence[step.method] = measured.quality.divergence_nats
    assert divergence["gptq"] < 0.9 * divergence["rtn"]


def test_each_linear_sees_what_the_compressed_ones_before_it_made(tmp_path):
    """The statistics of `o_proj` must come from quantized q, k and v: recomputed here with whole-model hooks."""
    model = tiny.FAMILIES["llama"](tmp_path / "model", num_hidden_layers=1)
    frame, (calibration, _) = frame_of(model), texts_of(model)
    done = engine.quantize(
        frame, GPTQ(method="gptq", bits=2, group_size=32), calibration.ids, None, tmp_path / "work", "", Silent()
    )
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layer = next(layer for layer in done.blocks[0].layers if layer.name.endswith("o_proj"))
    original = reference.get_submodule(layer.name).weight.detach().clone()
    for name in done.model.sites:
        if name.split(".")[-1] in {"q_proj", "k_proj", "v_proj"}:
            reference.get_submodule(name).weight.data.copy_(done.model.codes(name).dequantize(torch.float32))
    seen: list[Tensor] = []
    reference.get_submodule(layer.name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, 1))
    )
    logits_of(reference, calibration.ids)
    X = torch.cat(seen)
    changed = (done.model.codes(layer.name).dequantize(torch.float32) - original) @ X.T
    assert layer.relative_error == pytest.approx(
        float(changed.square().sum() / (original @ X.T).square().sum()), rel=1e-3
    )


def digests(directory) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in block_files(directory)]


def test_a_stopped_job_resumes_at_the_next_block_with_the_same_digests(tmp_path):
    model = tiny.FAMILIES["llama"](tmp_path / "model", num_hidden_layers=4)
    calibration, windows = texts_of(model)
    step = GPTQ(method="gptq", group_size=32)

    def run(directory, notify, fingerprint="f"):
        return engine.quantize(
            frame_of(model), step, calibration.ids, windows, directory, fingerprint, notify, snapshot_seconds=0
        )

    whole = run(tmp_path / "whole", Silent())
    for stop in (2, 3):
        with pytest.raises(Stopped):
            run(tmp_path / "broken", StopsAfter(stop))
    told: list[str] = []

    class Listens(Silent):
        def event(self, kind, message, **data):
            told.append(message)

    resumed = run(tmp_path / "broken", Listens())
    assert any("going on after block 2" in message for message in told)
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")
    assert torch.equal(resumed.activations.compressed[0], whole.activations.compressed[0])
    told.clear()
    run(tmp_path / "broken", Listens(), fingerprint="another recipe")
    assert told == []


@pytest.mark.parametrize(
    ("family", "asymmetric"),
    [("llama", False), ("gpt2", False), ("mixtral", False), ("llama", True), ("mixtral", True)],
)
def test_activations_on_disk_and_one_batch_at_a_time_give_the_same_codes(tmp_path, family, asymmetric):
    """The statistics, and with them every code, must not depend on how much memory there was."""
    model = tiny.FAMILIES[family](tmp_path / "model")
    calibration, windows = texts_of(model, samples=96)  # two batches of the calibration set
    told: list[str] = []

    class Listens(Silent):
        def event(self, kind, message, **data):
            told.append(message)

    step = GPTQ(method="gptq", group_size=32, asymmetric_calibration=asymmetric)
    quality = []
    for name, memory_bytes in (("roomy", None), ("tight", 100_000)):
        done = engine.quantize(
            frame_of(model), step, calibration.ids, windows, tmp_path / name, "", Listens(), memory_bytes=memory_bytes
        )
        quality.append(
            torch.cat([*done.activations.compressed, *done.activations.calibration, *done.activations.uncompressed])
        )
    assert any("on disk" in message for message in told)
    assert digests(tmp_path / "tight") == digests(tmp_path / "roomy")
    assert torch.equal(*quality)


def test_a_pass_that_was_finished_before_writes_nothing_again(tmp_path):
    """What is rewritten could be lost half-way to a kill, and then no attempt could go on."""
    model = tiny.FAMILIES["llama"](tmp_path / "model")
    calibration, _ = texts_of(model)
    step = GPTQ(method="gptq", group_size=32)

    def run() -> dict[str, int]:
        engine.quantize(frame_of(model), step, calibration.ids, None, tmp_path / "work", "f", Silent())
        files = [path for path in (tmp_path / "work").rglob("*") if path.name != "fingerprint" and path.is_file()]
        return {path.relative_to(tmp_path).as_posix(): path.stat().st_ino for path in files}

    once = run()
    assert any("snapshot-00002" in name for name in once)
    assert run() == once


def test_ignored_layers_stay_as_they_are(tmp_path):
    model = tiny.FAMILIES["llama"](tmp_path / "model")
    frame, (calibration, _) = frame_of(model), texts_of(model)
    step = GPTQ(method="gptq", group_size=32, ignore=("model.layers.0.*", "*.down_proj"))
    done = engine.quantize(frame, step, calibration.ids, None, tmp_path / "work", "", Silent())
    assert all(name.startswith("model.layers.1.") and "down_proj" not in name for name in done.model.sites)
    assert "model.layers.1.mlp.down_proj" in done.model.ignored and "model.layers.0.mlp.up_proj" in done.model.ignored


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_nan_in_the_weights_names_the_tensor(tmp_path, where):
    model = tiny.FAMILIES["llama"](tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state[where][3, 5] = float("nan")
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    frame, (calibration, _) = frame_of(model), texts_of(model)
    with pytest.raises(NotFinite, match=where):
        engine.quantize(frame, GPTQ(method="gptq", group_size=32), calibration.ids, None, tmp_path / "w", "", Silent())


def test_infinity_in_the_activations_names_the_block(tmp_path):
    model = tiny.FAMILIES["llama"](tmp_path / "model")
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"] *= 3e38
    state["model.layers.1.mlp.down_proj.weight"].clamp_(-3e38, 3e38)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    frame, (_, windows) = frame_of(model), texts_of(model)
    with pytest.raises(NotFinite, match="block 1"):
        engine.quantize(frame, RTN(method="rtn", group_size=32), None, windows, tmp_path / "work", "", Silent())


def test_a_missing_or_misshapen_tensor_is_named(tmp_path):
    model = tiny.FAMILIES["llama"](tmp_path / "model")
    good = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    for state in (
        {key: tensor for key, tensor in good.items() if key != name},
        good | {name: torch.zeros(3, 3)},
    ):
        save_file(state, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelMalformed, match=name):
            engine.quantize(
                frame_of(model), RTN(method="rtn", group_size=32), None, None, tmp_path / "work", "", Silent()
            )


def test_weights_are_freed_after_each_block(tmp_path):
    frame = frame_of(tiny.FAMILIES["llama"](tmp_path / "model"))
    with frame.block(0) as block:
        assert all(parameter.device == CPU for parameter in block.parameters())
    with frame.surroundings():
        pass
    assert all(parameter.is_meta for parameter in frame.model.parameters())
    assert all(parameter.is_meta for parameter in block.parameters())
