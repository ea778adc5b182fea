"""Records become tokens of which the right ones are learned; what is none is refused with its line."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.texts.material import read_tokenizer
from models.train.division import check_records
from models.train.examples import Examples, Split, read_examples
from squeeze.errors import DataUnusable
from tests.models.tiny import FAMILIES
from tests.models.train.parts import sums, written

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As those of reasoning models: what was thought is dropped once another message follows.
FORGETFUL = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content[:2] }}{% endfor %}"


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_tokenizer(FAMILIES["llama"](tmp_path_factory.mktemp("model") / "model"))


def split(tokenizer: Any, room: Path, rows: list[Any], length: int = 64, **changes: Any) -> Split:
    return read_examples(tokenizer, written(room / "rows", rows), None, length, origins=("file", "file"), **changes)


def learned(tokenizer: Any, examples: Examples) -> list[tuple[str, str]]:
    """(all of it, what is learned) of every example."""
    told = []
    for number in range(len(examples)):
        ids, scored = examples.one(number)
        told.append((tokenizer.decode(ids), tokenizer.decode(ids[scored])))
    return told


def test_of_a_prompt_and_its_completion_the_completion_is_learned_with_the_end(tokenizer: Any, tmp_path: Path) -> None:
    rows = sums(30)
    found = split(tokenizer, tmp_path, rows)
    told = learned(tokenizer, found.train) + learned(tokenizer, found.held_out)
    end = tokenizer.eos_token
    assert sorted(told) == sorted(
        (f"{row['prompt']}{row['completion']}{end}", f"{row['completion']}{end}") for row in rows
    )


def test_of_a_text_all_but_its_first_token_is_learned_and_a_long_one_becomes_several(
    tokenizer: Any, tmp_path: Path
) -> None:
    long = " ".join(f"word{n}" for n in range(200))
    rows = [{"text": long}, {"text": "short one"}, {"text": "another"}, {"text": "and a third"}]
    found = split(tokenizer, tmp_path, rows, 16)
    lengths = found.train.lengths + found.held_out.lengths
    assert max(lengths) == 16 and found.data.records + found.data.held_out_records == 4
    for side in (found.train, found.held_out):
        for number in range(len(side)):
            assert side.one(number)[1].tolist() == [False] + [True] * (side.lengths[number] - 1)
    whole = "".join(text for side in (found.train, found.held_out) for text, _ in learned(tokenizer, side))
    assert all(f"word{n}" in whole for n in range(200)) and not found.warnings


def test_of_a_chat_what_the_assistant_says_is_learned_with_what_ends_it(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    rows = [chat("hi", f"hello {n}", "and then", "good bye") for n in range(3)]
    rows += [
        {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "yes"}]} for n in range(2)
    ]
    rows += [{"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"},
                         {"role": "user", "content": "go on"}],
              "completion": [{"role": "assistant", "content": "new"}]}]  # fmt: skip
    found = split(tokenizer, tmp_path, rows, 128)
    told = dict(learned(tokenizer, found.train) + learned(tokenizer, found.held_out))
    first = "<user>hi</user>\n<assistant>hello 0</assistant>\n<user>and then</user>\n<assistant>good bye</assistant>\n"
    assert told[first] == "hello 0</assistant>\ngood bye</assistant>\n"
    assert told["<user>1?</user>\n<assistant>yes</assistant>\n"] == "yes</assistant>\n"
    assert "new</assistant>\n" in told.values() and not any("old" in one for one in told.values())


def test_chats_need_a_template_that_keeps_what_it_wrote(tokenizer: Any, tmp_path: Path) -> None:
    for template, words in (
        (None, "no chat template"),
        (FORGETFUL, "another way"),
        ("{{ raise_exception('no') }}", "refuses"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(DataUnusable, match=f"line 1.*{words}") as refused:
            split(tokenizer, tmp_path, [chat("hello", "world", "more", "words")] * 2)
        assert refused.value.param == "data.source"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "why?"}, "has no `completion`"),
        ({"completion": "so"}, "has no `prompt`"),
        ({"prompt": "why?", "completion": ""}, "`completion` is empty"),
        ({"prompt": "why?", "completion": ["so"]}, "two texts, or two lists"),
        ({"text": " "}, "`text` is empty"),
        ({"text": 3}, "`text` is no text"),
        ({"words": "here"}, "has none of `text`"),
        (chat("only a question"), "no message of the assistant"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": ["hi"]}, "message 1: a message is an object"),
        ({"messages": [{"content": "hi"}]}, "message 1 has no `role`"),
        ({"messages": [{"role": "user"}]}, "message 1 has no `content`"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_a_record_that_is_none_is_named_by_its_line_without_a_model(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    path = written(tmp_path / "rows", [*sums(2), row])
    with pytest.raises(DataUnusable, match=f"line 3.*{words}") as refused:
        check_records(path, None, (None, None))
    assert refused.value.param == "data.source"


def test_no_record_and_one_record_are_too_few_and_one_will_do_beside_a_held_out_text(tmp_path: Path) -> None:
    empty, one, other = (written(tmp_path / name, rows) for name, rows in
                         (("empty", [{"text": None}]), ("one", sums(1)), ("other", sums(1, seed=1))))  # fmt: skip
    with pytest.raises(DataUnusable, match="no records"):
        check_records(empty, None, (None, None))
    with pytest.raises(DataUnusable, match=r"one record; at least 2.*evaluation\.source"):
        check_records(one, None, (None, None))
    check_records(one, other, (None, None))
    with pytest.raises(DataUnusable, match="no records") as refused:
        check_records(one, empty, (None, None))
    assert refused.value.param == "evaluation.source"


def test_where_all_that_would_be_learned_lies_past_the_end_nothing_is_left(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "a long question, " * 20, "completion": f"{n}"} for n in range(5)]
    with pytest.raises(DataUnusable, match=r"nothing of the training data is left.*sequence_length"):
        split(tokenizer, tmp_path, rows, 16)
    found = split(tokenizer, tmp_path, rows + sums(40))
    assert any("lost what lies past" in one for one in found.warnings)
    assert any("5 records have nothing to learn" in one for one in found.warnings)


def test_a_record_is_on_the_same_side_wherever_it_stands(tokenizer: Any, tmp_path: Path) -> None:
    rows = sums(100)
    first = set(learned(tokenizer, split(tokenizer, tmp_path, rows).held_out))
    random.shuffle(rows)
    again = split(tokenizer, tmp_path, rows)
    assert set(learned(tokenizer, again.held_out)) == first
    assert 2 <= again.data.held_out_records <= 25
    few = split(tokenizer, tmp_path, sums(2))
    assert (few.data.records, few.data.held_out_records) == (1, 1)


def test_a_text_of_its_own_is_held_out_whole(tokenizer: Any, tmp_path: Path) -> None:
    own = written(tmp_path / "own", sums(7, seed=5))
    found = read_examples(tokenizer, written(tmp_path / "rows", sums(20)), own, 64, origins=("a", "b"))
    assert (found.data.records, found.data.held_out_records) == (20, 7)


def test_parquet_and_a_column_of_another_name_hold_the_same(tokenizer: Any, tmp_path: Path) -> None:
    rows = sums(20)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = split(tokenizer, tmp_path, rows)
    table = read_examples(tokenizer, tmp_path / "rows.parquet", None, 64, origins=("file", "file"))
    assert table.train.digest == lines.train.digest
    named = split(tokenizer, tmp_path, [{"body": f"text number {n}"} for n in range(9)], columns=("body", None))
    plain = split(tokenizer, tmp_path, [{"text": f"text number {n}"} for n in range(9)])
    assert named.train.digest == plain.train.digest
