"""Whole merges: models and adapters become one, which is measured; killed ones go on; what is no match is told."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.files.checkpoint import open_model
from models.merge import stream
from models.merge.job import Done, merged
from models.pipeline import check, check_entry, run
from models.resources import Clock
from squeeze.errors import ModelAlreadyCompressed, ModelMalformed, NotFinite, SqueezeError, VocabulariesDiffer
from squeeze.objects import Stage
from squeeze.steps.merging import Entry, Merge
from tests.models import tiny
from tests.models.job_parts import Heard, digests
from tests.models.merge.parts import adapter, base_model, finetuned, merging_inputs, spec_of

ALPHA_OVER_RANK = 8 / 4


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merging")


@pytest.fixture(scope="module")
def base(room: Path) -> Path:
    return base_model(room / "base")


@pytest.fixture(scope="module")
def entries(room: Path, base: Path) -> list[Path]:
    return [
        finetuned(base, room / "a", 1),
        finetuned(base, room / "b", 2),
        adapter(room / "c", 3),
        adapter(room / "d", 4),
    ]


def merge(
    step: dict[str, Any],
    base: Path,
    entries: list[Path],
    room: Path,
    heard: Heard | None = None,
    *,
    measures: bool = False,
) -> Done:
    evaluation = {"samples": 2, "perplexity": measures, "divergence": measures}
    inputs = merging_inputs(spec_of(step, entries, evaluation=evaluation), base, entries, room)
    asked = inputs.spec.steps[0]
    assert isinstance(asked, Merge)
    return merged(inputs, asked, Clock(), heard or Heard())


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def vectors_of(base: Path, entries: list[Path]) -> dict[str, list[torch.Tensor]]:
    """Task vectors, written out."""
    own, found = weights_of(base), {}
    for name, W in own.items():
        found[name] = [weights_of(path)[name] - W for path in entries[:2]]
        for path in entries[2:]:
            parts = weights_of(path)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            A, B = (parts.get(f"{module}.lora_{letter}.weight") for letter in "AB")
            found[name].append(torch.zeros_like(W) if A is None or B is None else ALPHA_OVER_RANK * B @ A)
    return found


def test_models_and_adapters_are_added_to_the_base_by_their_weights(
    tmp_path: Path, base: Path, entries: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PART_ELEMENTS", 4 * 5000)  # several parts to a tensor
    models = [
        {"model": f"org/{path.name}", "weight": w} for path, w in zip(entries, (0.5, -0.2, 1.0, 0.3), strict=True)
    ]
    heard = Heard()
    done = merge({"models": models, "normalize": False, "scale": 0.8}, base, entries, tmp_path, heard, measures=True)
    own, result = weights_of(base), weights_of(done.whole)
    assert list(result) == list(own) and open_model(done.whole).dtype == torch.bfloat16
    for name, vectors in vectors_of(base, entries).items():
        expected = own[name] + 0.8 * sum(w * v for w, v in zip((0.5, -0.2, 1.0, 0.3), vectors, strict=True))
        assert torch.allclose(result[name], expected, rtol=2**-8, atol=1e-6), name
    assert heard.stages == [Stage.loading, Stage.merging, Stage.evaluating]
    quality = done.measured.quality if done.measured else None
    assert quality is not None and quality.divergence_nats is not None and quality.divergence_nats > 0.01
    told = done.merging
    elements = sum(W.numel() for W in own.values())
    assert told.elements == elements and [one.kind for one in told.models] == ["model", "model", "adapter", "adapter"]
    flat = [torch.cat([vectors[n].flatten() for vectors in vectors_of(base, entries).values()]) for n in range(4)]
    lengths = torch.cat([W.flatten() for W in own.values()]).norm()
    for one, vector in zip(told.models, flat, strict=True):
        assert one.changed == one.used == pytest.approx(int((vector != 0).sum()), rel=0.001) and one.trimmed == 0
        assert one.relative_length == pytest.approx(float(vector.norm() / lengths), rel=1e-3)
        apart = torch.cosine_similarity(vector, flat[0], dim=0)
        assert one.cosines[0] == pytest.approx(float(apart), abs=1e-3)


def test_ties_trims_each_tensor_to_its_share(tmp_path: Path, base: Path, entries: list[Path]) -> None:
    done = merge({"method": "ties", "density": 0.1}, base, entries, tmp_path)
    kept = sum(round(0.1 * W.numel()) for W in weights_of(base).values())
    for one in done.merging.models[:2]:
        assert one.changed - one.trimmed == pytest.approx(kept, rel=0.02)  # as large as the smallest that is kept
        assert one.conflicting > 0 and one.used < one.changed - one.trimmed
    own, result = weights_of(base), weights_of(done.whole)
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0.1 < float((own[name] != result[name]).float().mean()) < 0.2


class Stopped(Exception):
    pass


class Stopping(Heard):
    """Ends the work once half of the bytes are written."""

    def advance(self, done: int, total: int, unit: str) -> None:
        if unit == "bytes" and 2 * done >= total:
            raise Stopped


@pytest.mark.parametrize("method", ["dare", "ties"])
def test_a_merge_goes_on_after_the_tensors_that_are_there(
    tmp_path: Path, base: Path, entries: list[Path], method: str
) -> None:
    with pytest.raises(Stopped):
        merge({"method": method}, base, entries, tmp_path / "stopped", Stopping())
    journal = tmp_path / "stopped" / "work" / "merge" / "journal"
    with journal.open("ab") as lines:
        lines.write(b'["cut off')
    heard = Heard()
    gone_on = merge({"method": method}, base, entries, tmp_path / "stopped", heard)
    assert any("going on after" in message for message in heard.messages)
    quiet = merge({"method": method}, base, entries, tmp_path / "quiet")
    assert digests(gone_on.whole) == digests(quiet.whole) and gone_on.merging == quiet.merging
    assert merge({"method": method}, base, entries, tmp_path / "quiet").merging == quiet.merging
    other = merge({"method": method, "scale": 0.5}, base, entries, tmp_path / "quiet")
    assert digests(other.whole) != digests(gone_on.whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dare", "ties"])
def test_a_merge_that_is_killed_goes_on_to_the_same_bytes(
    tmp_path: Path, base: Path, entries: list[Path], method: str
) -> None:
    command = [sys.executable, "-m", "tests.models.merge.killed", method, str(base), str(tmp_path / "killed"), "0.5"]
    ended = subprocess.run([*command, *map(str, entries)], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    heard = Heard()
    gone_on = merge({"method": method}, base, entries, tmp_path / "killed", heard)
    assert any("going on after" in message for message in heard.messages)
    quiet = merge({"method": method}, base, entries, tmp_path / "quiet")
    assert digests(gone_on.whole) == digests(quiet.whole)
    assert gone_on.merging == quiet.merging


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "phi3"])
def test_a_model_merged_with_itself_stays_what_it_is(tmp_path: Path, family: str) -> None:
    base = base_model(tmp_path / "base", family)
    one = finetuned(base, tmp_path / "one", 1)
    same = finetuned(base, tmp_path / "same", 1)
    done = merge({"method": "ties", "density": 1.0}, base, [one, same], tmp_path / "room")
    mine, theirs = open_model(done.whole), open_model(one)
    assert set(mine.names()) <= set(theirs.names())
    assert all(torch.equal(mine.tensor(name), theirs.tensor(name)) for name in mine.names())


def test_an_entry_that_learned_nothing_is_told(tmp_path: Path, base: Path, entries: list[Path]) -> None:
    done = merge({"method": "linear"}, base, [base, entries[0]], tmp_path)
    assert any("very weights of the base" in warning for warning in done.warnings)
    assert done.merging.models[0].cosines == [None, None]


def other_words(base: Path, directory: Path) -> Path:
    path = finetuned(base, directory, 5)
    words = json.loads((path / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (path / "tokenizer.json").write_text(json.dumps(words))
    return path


def damaged(base: Path, directory: Path) -> Path:
    path = finetuned(base, directory, 5)
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    return path


REFUSED: dict[str, tuple[Any, type[SqueezeError], str]] = {
    "depth": (lambda base, path: tiny.llama(path, num_hidden_layers=3), ModelMalformed, "num_hidden_layers|lacks"),
    "family": (lambda base, path: tiny.gpt2(path), ModelMalformed, "model_type 'gpt2'"),
    "vocabulary": (lambda base, path: tiny.llama(path, vocab_size=520), ModelMalformed, "its vocabulary"),
    "heads": (lambda base, path: finetuned(base, path, 5, num_attention_heads=8, head_dim=32), ModelMalformed, "heads"),
    "words": (other_words, VocabulariesDiffer, "other tokens"),
    "nan": (damaged, NotFinite, "NaN"),
    "quantized": (
        lambda base, path: finetuned(base, path, 5, quantization_config={"quant_method": "gptq", "bits": 4}),
        ModelAlreadyCompressed,
        "16-bit model",
    ),
    "other layers": (lambda base, path: adapter(path, 3, width=96), ModelMalformed, "adapter of another model"),
    "other base": (lambda base, path: adapter(path, 3, base="org/other"), ModelMalformed, "same_base"),
    "prompt": (lambda base, path: adapter(path, 3, peft_type="PROMPT_TUNING"), ModelMalformed, "PROMPT_TUNING"),
    "saved": (lambda base, path: adapter(path, 3, modules_to_save=["lm_head"]), ModelMalformed, "merge_and_unload"),
    "bias": (lambda base, path: adapter(path, 3, bias="all"), ModelMalformed, "biases"),
    "pissa": (lambda base, path: adapter(path, 3, init_lora_weights="pissa"), ModelMalformed, "init_lora_weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_match_is_refused_with_what_to_do(
    tmp_path: Path, base: Path, entries: list[Path], case: str
) -> None:
    make, error, words = REFUSED[case]
    wrong = make(base, tmp_path / "wrong")
    with pytest.raises(error, match=words) as refused:
        merge({"method": "linear"}, base, [entries[0], wrong], tmp_path / "room")
    if case != "nan":
        assert refused.value.param == "steps.0.models.1.model"
    assert not (tmp_path / "room" / "work" / "merge" / "model").exists()


def test_settings_alone_tell_of_most_of_it_before_weights_are_fetched(
    tmp_path: Path, base: Path, entries: list[Path]
) -> None:
    spec = spec_of({}, entries)
    assert check(spec, base).blocks == tiny.LAYERS
    for case in ("family", "quantized", "other base", "prompt", "heads"):
        make, error, _ = REFUSED[case]
        wrong = make(base, tmp_path / case)
        for file in wrong.glob("*.safetensors"):
            file.unlink()
        with pytest.raises(error) as refused:
            check_entry(base, "org/model", Entry(model="org/wrong"), wrong)
        assert refused.value.param == "model"
    check_entry(base, "org/model", Entry(model="org/c", same_base=True), tmp_path / "other base")
    check_entry(base, "org/model", Entry(model="org/c"), entries[2])


def test_a_foreign_adapter_s_own_ranks_and_scales_are_its_own(tmp_path: Path, base: Path) -> None:
    one = adapter(tmp_path / "one", 3, alpha_pattern={"layers.0.self_attn.q_proj": 2}, use_rslora=True)
    done = merge({"method": "linear"}, base, [one], tmp_path / "room")
    own, result, parts = weights_of(base), weights_of(done.whole), weights_of(one)
    for layer, alpha in ((0, 2.0), (1, 8.0)):
        name = f"model.layers.{layer}.self_attn.q_proj"
        A, B = (parts[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        expected = own[f"{name}.weight"] + alpha / 2 * B @ A
        assert torch.allclose(result[f"{name}.weight"], expected, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties", "dare", "magmax"])
def test_a_job_that_merges_is_certified_and_says_how_far_it_is_from_the_base(
    tmp_path: Path, base: Path, entries: list[Path], method: str
) -> None:
    inputs = merging_inputs(spec_of({"method": method}, entries), base, entries, tmp_path)
    outcome = run(inputs, Heard())
    report = outcome.report
    assert set(outcome.directories) == {"safetensors"} and report.bits_per_weight is None
    assert report.certificates[0].outcome == "passed" and report.quality is not None
    assert report.merging is not None and report.merging.quality is None and report.merging.method == method
    assert outcome.result.divergence_nats == report.quality.divergence_nats
    before = digests(inputs.out)
    again = run(inputs, Heard())
    assert digests(inputs.out) == before and again.report.merging == report.merging
    card = (outcome.directories["safetensors"] / "README.md").read_text()
    assert 'base_model_relation: "merge"' in card and "org/c" in card


@pytest.mark.slow
def test_what_was_merged_is_quantized_in_the_same_job(tmp_path: Path, base: Path, entries: list[Path]) -> None:
    first = spec_of({"method": "ties"}, entries).steps[0].model_dump()
    steps = [first, {"kind": "quantize", "method": "rtn", "group_size": 32}]
    outcome = run(merging_inputs(spec_of({}, entries, steps=steps), base, entries, tmp_path), Heard())
    report = outcome.report
    assert report.merging is not None and report.merging.quality is not None and report.quality is not None
    assert report.quality.perplexity_before == pytest.approx(report.merging.quality.perplexity_after)
    assert report.bits_per_weight == 4.5 and report.certificates[0].outcome == "passed"
    assert report.source.bytes == open_model(base).weight_bytes
    assert [step["method"] for step in report.recipe] == ["ties", "rtn"]


@pytest.mark.slow
def test_what_was_merged_learns_on_in_the_same_job(tmp_path: Path, base: Path, entries: list[Path]) -> None:
    from tests.models.train.parts import sums, written

    first = spec_of({"method": "magmax"}, entries).steps[0].model_dump()
    lora = {"kind": "finetune", "method": "lora", "merge": True, "steps": 4, "learning_rate": 0.01, "rank": 4}
    data = {"source": "file-abcdefgh", "sequence_length": 48}
    spec = spec_of({}, entries, steps=[first, lora], data=data)
    inputs = dataclasses.replace(
        merging_inputs(spec, base, entries, tmp_path), calibration_text=written(tmp_path / "rows.jsonl", sums())
    )
    outcome = run(inputs, Heard())
    assert set(outcome.directories) == {"safetensors"}
    assert outcome.report.training is not None and outcome.report.merging is not None
    assert outcome.report.source.bytes == open_model(base).weight_bytes
