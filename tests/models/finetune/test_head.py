"""Classification heads: what they learn from texts with labels, and that transformers loads them as its own."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from models.files.checkpoint import open_model
from models.finetune import head
from models.job import Inputs
from models.pipeline import check, run
from models.train.division import check_records, divided
from models.train.examples import read_examples
from models.train.scoring import example_losses
from models.train.task import accelerator_of
from models.train.turns import labelled_tokens
from squeeze.costs.trainable import learned
from squeeze.errors import ArchitectureUnsupported, DataUnusable
from squeeze.shapes.architectures import ARCHITECTURES, CLASSIFIABLE
from squeeze.steps.finetuning import Head
from squeeze.texts.labels import Labelled
from tests.models.job_parts import Heard
from tests.models.tiny import FAMILIES, tokenizer
from tests.models.train.parts import begin, go_on, inputs_for, seen, spec_of, written

pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
CPU = torch.device("cpu")
STEP: dict[str, Any] = {"method": "head", "layers": 1, "steps": 24, "learning_rate": 3e-3, "batch_size": 16}
SAID = {0: ("bad", "sad", "poor"), 1: ("good", "fine", "nice"), 2: ("round", "flat", "long")}


def reviews(count: int = 120, seed: int = 0) -> list[dict[str, Any]]:
    """Three sixths of label 1, two of 0, one of 2, sorted by label; a word in the middle tells which."""
    dice = random.Random(seed)
    labels = sorted((0, 0, 1, 1, 1, 2)[n % 6] for n in range(count))
    return [
        {"text": f"my {dice.choice(['day', 'meal', 'film'])} {n} was {dice.choice(SAID[label])} then", "label": label}
        for n, label in enumerate(labels)
    ]


def file_of(path: Path, *pairs: tuple[str, Any]) -> Path:
    return written(path, [{"text": text, "label": label} for text, label in pairs])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model")


def held_out(inputs: Inputs) -> tuple[float, float]:
    """(accuracy, share of the commonest label) after the training."""
    task, _ = go_on(inputs)
    right = task.held_out_accuracy(accelerator_of("fp32", CPU))
    labels = Counter(int(task.held_out.one(number)[0][-1]) for number in range(len(task.held_out)))
    return right, max(labels.values()) / len(task.held_out)


def test_which_families_have_classifiers_is_what_transformers_says() -> None:
    assert set(CLASSIFIABLE) == {one for one in ARCHITECTURES if one in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "bloom"])
def test_every_token_gets_what_transformers_says_of_a_text_that_ends_there(tmp_path: Path, family: str) -> None:
    path, ids = FAMILIES[family](tmp_path / "model"), torch.arange(3, 23)[None]
    mine = head.finetune(head.load(path, ["a", "b", "c"], torch.float32, CPU), Head(method="head"), [])
    head.write(mine, ["a", "b", "c"], open_model(path), tmp_path / "out")  # which rounds it
    logits = mine.float()(input_ids=ids).logits
    assert logits.shape == (1, 20, 3) and mine.get_output_embeddings() is mine.score
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for end in (1, 7, 20):
        torch.testing.assert_close(loaded(input_ids=ids[:, :end]).logits[0], logits[0, end - 1].detach())
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"} and loaded.config.label2id == {"a": 0, "b": 1, "c": 2}
    names = open_model(path).names()
    assert {*stored_names(tmp_path / "out")} == {*names, "score.weight"} - {"lm_head.weight"}


def stored_names(path: Path) -> list[str]:
    return [name for file in path.glob("*.safetensors") for name in load_file(file)]


def test_the_label_s_number_behind_the_text_is_all_that_is_scored(tmp_path: Path) -> None:
    rows = file_of(tmp_path / "rows.jsonl", *[(f"text {n}", ("yes", "no", "maybe")[n % 3]) for n in range(60)])
    split = read_examples(tokenizer(), rows, None, 32, origins=("a", "a"), label="label")
    assert list(split.data.labels or ()) == ["maybe", "no", "yes"]
    sides = split.data.labels, split.data.held_out_labels
    assert [sum((side or {}).values()) for side in sides] == [split.data.records, split.data.held_out_records]
    ids, scored = split.train.one(0)
    assert ids.tolist() == [*tokenizer()("text 0")["input_ids"], 2]
    assert scored.tolist() == [False] * (len(ids) - 1) + [True]
    assert split.data.learned_tokens == split.data.records


def test_a_long_text_keeps_its_beginning_and_ends_of_text_fill_up(tmp_path: Path) -> None:
    words = tokenizer()("one two three four five six seven")["input_ids"]
    (ids, scored), cut = labelled_tokens(tokenizer(), "one two three four five six seven", 1, 5)
    assert (ids, scored, cut) == ([*words[:4], 1], [False] * 4 + [True], True)
    end = tokenizer().eos_token_id
    assert labelled_tokens(tokenizer(), "one two<|endoftext|>", 1, 9)[0][0] == [*tokenizer()("one two")["input_ids"], 1]
    assert labelled_tokens(tokenizer(), "<|endoftext|>" * 3, 1, 9)[0][0] == [end, 1], "as transformers takes the first"
    rows = file_of(tmp_path / "rows.jsonl", *[("many words " * 9 + str(n), n % 2) for n in range(20)])
    split = read_examples(tokenizer(), rows, None, 16, origins=("a", "a"), label="label")
    assert "20 texts are longer than 15 tokens and lost what lies past them" in split.warnings
    assert max(split.train.lengths) == 16


def test_a_record_of_each_label_stays_to_be_learned(tmp_path: Path) -> None:
    rows = file_of(tmp_path / "rows.jsonl", *[(f"text {n}", n // 2) for n in range(400)])
    sides = [(apart, one.label) for apart, _, one in divided(rows, None, label="label") if isinstance(one, Labelled)]
    kept, out = ({label for apart, label in sides if apart is side} for side in (False, True))
    assert kept == set(range(200)) and 10 < len(out) < 80
    once = file_of(tmp_path / "once.jsonl", ("a", 1), ("b", 2), ("c", 3))
    with pytest.raises(DataUnusable, match="every label is seen once only"):
        list(divided(once, None, label="label"))
    pair = file_of(tmp_path / "pair.jsonl", ("a", 1), ("b", 2), ("c", 2))
    assert [apart for apart, _, _ in divided(pair, None, label="label")].count(True) == 1


def test_labels_that_can_t_be_learned_or_measured_are_refused(tmp_path: Path) -> None:
    good = file_of(tmp_path / "good.jsonl", ("a", "x"), ("b", "y"), ("c", "y"))
    check_records(good, None, (None, None), "label")
    for rows, words in (
        ([("a", "x"), ("b", "x")], "all records have the label `x`"),
        ([("a", "x"), ("b", None), ("c", 3)], "line 2: `label` is null(.|\n)*line 3: `label` is a whole number"),
    ):
        with pytest.raises(DataUnusable, match=words) as refused:
            check_records(file_of(tmp_path / "bad.jsonl", *rows), None, (None, None), "label")
        assert refused.value.param == "data.source"
    other = file_of(tmp_path / "other.jsonl", ("a", "z"))
    with pytest.raises(DataUnusable, match="no record to learn from has: `z`") as refused:
        check_records(good, other, (None, None), "label")
    assert refused.value.param == "evaluation.source"


def test_labels_of_parquet_are_read_from_their_own_column(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["a", "b", "c"], "stars": [5, 1, 5], "more": [0.5] * 3}), file)
    labels = [one.label for _, _, one in divided(file, None, ("body", None), "stars") if isinstance(one, Labelled)]
    assert labels == [5, 1, 5]
    with pytest.raises(DataUnusable, match="has no `label` among its columns"):
        check_records(file, None, ("body", None), "label")


def test_a_head_learns_what_can_be_told_apart_packed_or_not(tmp_path: Path, model: Path) -> None:
    for packing in (False, True):
        spec = spec_of(STEP | {"packing": packing} | ({"batch_size": 4} if packing else {}))
        right, share = held_out(inputs_for(spec, model, tmp_path / str(packing), reviews()))
        assert share < 0.7 and right > share + 0.25


def test_examples_that_share_a_sequence_lose_what_they_lose_alone(tmp_path: Path, model: Path) -> None:
    def losses(packing: bool) -> Tensor:
        spec = spec_of(STEP | {"packing": packing})
        _, task = begin(inputs_for(spec, model, tmp_path / str(packing), reviews()))
        assert task.packed is packing
        return example_losses(task.model, task.held_out, task.held_out_rows, packed=packing, size=None, device=CPU)[0]

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-4, atol=1e-5)


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, model: Path) -> None:
    class Stopped(Exception):
        pass

    class Stopping(Heard):
        def advance(self, done: int, total: int, unit: str) -> None:
            if unit == "steps" and done == 5:
                raise Stopped

    spec = spec_of(STEP | {"steps": 9, "evaluate_every": 4})
    inputs = inputs_for(spec, model, tmp_path / "stopped", reviews())
    with pytest.raises(Stopped):
        go_on(dataclasses.replace(inputs, snapshot_seconds=0.0), Stopping())
    resumed, after = go_on(inputs)
    through, story = go_on(inputs_for(spec, model, tmp_path / "through", reviews()))
    assert after.resumed == [4] and seen(after) == seen(story) and after.held_out == story.held_out
    assert torch.equal(resumed.model.score.weight, through.model.score.weight)


def test_a_job_ends_with_a_classifier_that_a_pipeline_of_transformers_uses(tmp_path: Path, model: Path) -> None:
    outcome = run(inputs_for(spec_of(STEP), model, tmp_path, reviews()), Heard())
    training, out = outcome.report.training, outcome.directories["safetensors"]
    assert training is not None and [*outcome.directories] == ["safetensors"]
    assert training.accuracy_before is not None and training.accuracy_after is not None
    assert training.majority_share is not None and training.accuracy_after > training.majority_share + 0.25
    assert training.loss_written == pytest.approx(training.loss_after, rel=0.05)
    assert (
        list(training.data.labels or ()) == ["0", "1", "2"] and outcome.result.accuracy_after == training.accuracy_after
    )
    assert any("the accuracy was measured on" in one for one in outcome.report.warnings)
    seen = {one.consumer: one for one in outcome.report.certificates}
    assert seen["transformers"].outcome == "passed" and seen["vllm"].outcome == "not checked"
    assert "AutoModelForSequenceClassification" in seen["transformers"].detail
    assert "a batch that is filled up gives the same labels" in seen["transformers"].detail
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["pad_token_id"] == 0
    card = (out / "README.md").read_text()
    assert 'pipeline_tag: "text-classification"' in card and 'pipeline("text-classification", model=directory)' in card
    assert "| Held-out labels that it tells (" in card and "nats a label" in card
    assert AutoTokenizer.from_pretrained(out).padding_side == "right"
    classify = pipeline("text-classification", model=str(out), device="cpu")
    texts = ["my day 7 was sad then", "my film was fine then", "my meal 101 was long then"]
    told = [one["label"] for one in classify(texts, truncation=True, max_length=47, batch_size=3)]
    assert told == ["0", "1", "2"] == [classify(one)[0]["label"] for one in texts]
    with pytest.raises(ArchitectureUnsupported, match="the model is a classifier"):
        check(spec_of(), out)


def test_a_family_without_a_classifier_is_refused_before_its_weights_come(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureUnsupported, match="no granite model for sequence classification"):
        check(spec_of(STEP), FAMILIES["granite"](tmp_path / "model"))


def test_more_labels_than_tokens_are_refused(tmp_path: Path, model: Path) -> None:
    rows = [{"text": f"text {n}", "label": n // 2} for n in range(1100)]
    with pytest.raises(DataUnusable, match="more labels than the 512 tokens"):
        begin(inputs_for(spec_of(STEP), model, tmp_path, rows))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("layers", [0, 1])
def test_the_parameters_that_learn_are_known_from_the_headers(tmp_path: Path, family: str, layers: int) -> None:
    spec = spec_of(STEP | {"layers": layers})
    prepared, task = begin(inputs_for(spec, FAMILIES[family](tmp_path / "model"), tmp_path, reviews()))
    tensors = {name: entry.shape for name, entry in prepared.source.entries.items()}
    assert isinstance(prepared.step, Head)
    told = learned(prepared.step, prepared.source.config, tensors, labels=3)
    assert told.parameters == sum(one.numel() for one in task.learning.values()) and told.blocks == layers
    assert told.left_out == sum(torch.Size(sides).numel() for name, sides in tensors.items() if "lm_head" in name)
