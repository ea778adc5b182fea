"""Records with a label: what is wrong with them is told with its line, and labels have an order of their own."""

from typing import Any

import pytest

from squeeze.errors import DataUnusable
from squeeze.texts.documents import Row
from squeeze.texts.labels import (
    Labelled,
    doubts,
    labelled_in,
    name_of,
    names_in_order,
    refuse_one_label,
    refuse_unknown,
)
from squeeze.texts.records import Faults

GOOD = {"text": "a", "label": "x"}


def lines(*rows: Any) -> list[Row]:
    return [(f"line {number}", row) for number, row in enumerate(rows, start=1)]


def test_a_text_and_its_label_are_read_and_rows_without_either_are_passed_over() -> None:
    found = [
        *labelled_in(lines(GOOD, {"text": None, "label": None}, {"text": "b", "label": "y", "more": 1}), None, "label")
    ]
    assert found == [("line 1", Labelled("a", "x")), ("line 3", Labelled("b", "y"))]
    renamed = lines({"body": "a", "sentiment": False}, {"body": "b", "sentiment": True})
    assert [one.label for _, one in labelled_in(renamed, "body", "sentiment")] == [False, True]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "b"}, "line 2 has no `label`"),
        ({"label": "y"}, "line 2 has no `text`"),
        ({"text": "b", "label": None}, "line 2: `label` is null"),
        ({"text": None, "label": "y"}, "line 2: `text` is null"),
        ({"text": " ", "label": "y"}, "line 2: `text` is empty"),
        ({"text": 3, "label": "y"}, "line 2: `text` is no text"),
        ({"text": [{"role": "assistant", "content": "b"}], "label": "y"}, "line 2: `text` is no text"),
        ({"text": "b", "label": ""}, "line 2: `label` is empty"),
        ({"text": "b", "label": "y" * 201}, "line 2: `label` has 201 characters"),
        ({"text": "b", "label": 1.5}, "line 2: `label` is to be a string, a whole number or a bool"),
        ({"text": "b", "label": 1}, "line 2: `label` is a whole number, and a string in line 1"),
        ({"text": "b", "label": True}, "line 2: `label` is true or false, and a string in line 1"),
    ],
)
def test_what_is_no_text_with_a_label_is_told_with_its_line(row: dict[str, Any], words: str) -> None:
    faults = Faults()
    assert len([*labelled_in(lines(GOOD, row, GOOD), None, "label", faults)]) == 2
    with pytest.raises(DataUnusable, match=words):
        faults.refuse_any()


def test_running_text_has_no_labels() -> None:
    with pytest.raises(DataUnusable, match="plain text, which has no labels"):
        next(labelled_in([("", "some words")], None, "label"))


def test_labels_are_numbered_by_value_or_by_name_whatever_their_order() -> None:
    assert names_in_order([10, 9, 10, -1]) == ["-1", "9", "10"]
    assert names_in_order(["b", "a", "B"]) == ["B", "a", "b"]
    assert names_in_order([True, False]) == ["false", "true"]
    assert name_of("true") == "true"


def test_one_label_or_an_unknown_one_is_refused() -> None:
    with pytest.raises(DataUnusable, match="all records have the label `x`"):
        refuse_one_label(["x"])
    refuse_one_label(["x", "y"])
    with pytest.raises(DataUnusable, match="no record to learn from has: `z`") as refused:
        refuse_unknown(["x", "z"], ["x", "y"])
    assert refused.value.param == "evaluation.source"


def test_rare_labels_and_those_that_nobody_measures_are_warned_of() -> None:
    assert doubts({"x": 5, "y": 2}, {"x": 1, "y": 1}) == []
    once, missing = doubts({"x": 5, "y": 1}, {"x": 1})
    assert "once" in once and "`y`" in once and "held-out" in missing and "`y`" in missing
    many = doubts({str(n): 1 for n in range(9)}, {str(n): 1 for n in range(9)})
    assert many[0].endswith("`4` and 4 more")
