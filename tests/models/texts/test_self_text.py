"""Text that a model samples itself: that it is its own, decided by the seed, kept, and refused where it can't be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.pipeline import check
from models.texts import self_text
from models.texts.material import SELF_WARNING, Material, read_tokenizer
from models.texts.self_text import COOLING_TOKENS, need_of, refuse_too_large, sampled_text, temperature_at
from squeeze.errors import DataUnusable, NotFinite
from squeeze.objects import Stage
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.quantization import GPTQ, RTN
from tests.models.engine_parts import frame_of
from tests.models.job_parts import Heard
from tests.models.tiny import FAMILIES, VOCABULARY

LENGTH = 48


def sampled(model: Path, work: Path, samples: int = 6, seed: int = 0, heard: Heard | None = None) -> torch.Tensor:
    tokenizer = read_tokenizer(model)
    return sampled_text(frame_of(model), tokenizer, samples, LENGTH, seed, work, heard or Heard())[0]


def without_start_token(model: Path) -> Path:
    """Its tokenizer has a token that ends a text, and none that begins one."""
    settings = model / "tokenizer_config.json"
    held = json.loads(settings.read_text())
    settings.write_text(json.dumps({name: value for name, value in held.items() if name != "bos_token"}))
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "opt"])
def test_the_tokens_are_drawn_from_the_model_s_own_probabilities(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family](tmp_path / "model")
    ids = sampled(model, tmp_path / "work", samples=40)
    assert ids.shape == (40, LENGTH) and ids.dtype == torch.int64
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logs = torch.log_softmax(whole(ids).logits[:, COOLING_TOKENS:-1].float(), -1)
    surprise = -logs.gather(-1, ids[:, COOLING_TOKENS + 1 :, None])[..., 0]
    entropy = -(logs.exp() * logs).sum(-1)
    difference = surprise - entropy  # zero on average if the model's probabilities are those that were drawn from
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / difference.numel() ** 0.5
    assert float(entropy.mean()) < 0.98 * float(torch.log(torch.tensor(float(VOCABULARY))))


def test_it_starts_hot_and_cools() -> None:
    warmth = [temperature_at(n) for n in range(1, 40)]
    assert warmth[0] == self_text.START_TEMPERATURE
    assert warmth == sorted(warmth, reverse=True)
    assert set(warmth[COOLING_TOKENS:]) == {self_text.FINAL_TEMPERATURE}


def test_the_seed_decides_and_no_sequence_is_like_another(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    one, same, other = (sampled(model, tmp_path / str(n), seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len({tuple(row) for row in one.tolist()}) == len(one)
    assert set(one[:, 0].tolist()) == {read_tokenizer(model).bos_token_id}


def test_where_no_token_begins_a_text_the_first_is_drawn(tmp_path: Path) -> None:
    model = without_start_token(FAMILIES["llama"](tmp_path / "model"))
    tokenizer = read_tokenizer(model)
    ids, origin = sampled_text(frame_of(model), tokenizer, 40, 16, 0, tmp_path / "work", Heard())
    first = ids[:, 0].tolist()
    assert len(set(first)) > 20
    assert not set(first) & set(tokenizer.all_special_ids)
    assert "a token drawn from the vocabulary" in origin


def test_a_text_that_ends_is_followed_by_another_that_starts_hot(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    tokenizer = read_tokenizer(model)
    frame, length = frame_of(model), 128
    ids = torch.cat(
        [sampled_text(frame, tokenizer, 64, length, seed, tmp_path / "work", Heard())[0] for seed in range(3)]
    )
    begun = torch.cummax(torch.where(ids == tokenizer.eos_token_id, torch.arange(length), 0), dim=1).values
    age = torch.arange(length) - begun + 1  # of the token that each position predicts
    hot = ((age <= 5) & (begun > 0))[:, :-1]
    assert hot.sum() > 100
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = torch.cat([whole(part).logits for part in ids.split(64)])[:, :-1][hot].float()
    for warmth, fits in ((torch.tensor([temperature_at(n) for n in age[:, :-1][hot].tolist()]), True), (1.0, False)):
        logs = torch.log_softmax(logits / torch.as_tensor(warmth).reshape(-1, 1), -1)
        difference = -logs.gather(-1, ids[:, 1:][hot][:, None])[:, 0] + (logs.exp() * logs).sum(-1)
        assert (abs(float(difference.mean())) < 4 * float(difference.std()) / len(difference) ** 0.5) is fits


def test_what_was_sampled_is_kept_and_an_interrupted_batch_alone_is_sampled_again(tmp_path: Path) -> None:
    model, many = FAMILIES["llama"](tmp_path / "model"), 2 * self_text.MOST_SEQUENCES + 2
    heard = Heard()
    whole = sampled(model, tmp_path / "work", many, heard=heard)
    assert heard.stages == [Stage.calibrating]
    files = sorted((tmp_path / "work" / "self_text").glob("*.safetensors"))
    assert len(files) == 3
    before = files[0].stat().st_mtime_ns
    files[1].unlink()
    assert torch.equal(sampled(model, tmp_path / "work", many), whole)
    assert files[0].stat().st_mtime_ns == before
    again = Heard()
    assert torch.equal(sampled(model, tmp_path / "work", many, heard=again), whole)
    assert again.stages == []
    assert not torch.equal(sampled(model, tmp_path / "work", many, seed=5), whole)


def test_padding_of_the_vocabulary_is_never_spoken(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model", vocab_size=VOCABULARY + 2000)
    assert int(sampled(model, tmp_path / "work").max()) < VOCABULARY


def test_a_model_that_does_not_fit_whole_is_refused_with_figures_before_its_weights_come(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    need = need_of(frame_of(model), 128, 128, torch.float32)
    own = sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert need.weights == 4 * own
    with pytest.raises(
        DataUnusable, match=r"must fit in memory whole: .* 0\.\d GiB .* 0\.1 GiB of host memory are free"
    ):
        refuse_too_large(need, 100 << 20, "host memory")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 200, "intermediate_size": 1 << 22}))
    (model / "model.safetensors").unlink()
    spec = {"model": "org/model", "data": {"source": "self"}, "formats": ["compressed-tensors"]}
    with pytest.raises(DataUnusable, match="fit in memory whole") as refused:
        check(JobSpec.model_validate(spec | {"steps": [GPTQ(method="gptq", group_size=32)]}), model)
    assert refused.value.param == "data.source"
    check(JobSpec.model_validate(spec | {"steps": [RTN(method="rtn", group_size=32)]}), model)  # needs no text


def test_a_model_of_nan_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        whole.model.norm.weight.fill_(float("nan"))
    whole.save_pretrained(model)
    with pytest.raises(NotFinite, match="probabilities"):
        sampled(model, tmp_path / "work")


def test_a_job_calibrates_on_what_the_model_says_and_is_measured_on_generic_text(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    found = material(model, tmp_path, {"source": "self", "samples": 4, "sequence_length": 32})
    assert found.calibration is not None and found.windows is not None
    assert found.calibration.text.origin.startswith("sampled by the model itself (each text from <|endoftext|>, temp")
    assert not found.calibration.text.generic and found.windows.text.generic
    assert SELF_WARNING in found.warnings()


def material(model: Path, tmp_path: Path, data: dict[str, Any]) -> Material:
    step = GPTQ(method="gptq", group_size=32)
    spec = JobSpec.model_validate(
        {"model": "org/model", "steps": [step], "data": data, "evaluation": {"samples": 2}, "seed": 3}
    )
    return Material(spec, step, read_tokenizer(model), frame_of(model), None, None, work=tmp_path / "work")
