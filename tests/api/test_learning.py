"""Uploaded examples are looked at before the job that names them is taken: wrong lines are named, nothing is kept."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from api.learning import CHECKED_BYTES
from jobs.queue import waiting
from squeeze.objects import Plan
from tests.api.serving import Running

LORA = {"kind": "finetune", "method": "lora"}
GOOD = [{"prompt": f"{n}?", "completion": f"{n}."} for n in range(3)]


def uploaded(running: Running, content: bytes | list[Any], name: str = "rows.jsonl") -> str:
    if isinstance(content, list):
        content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in content).encode()
    answer = running.client.post("/v1/files", data={"purpose": "training"}, files={"file": (name, content)})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def parquet(**columns: Any) -> bytes:
    made = io.BytesIO()
    pq.write_table(pa.table(columns), made)
    return made.getvalue()


def submitted(running: Running, source: str, **changes: Any) -> httpx.Response:
    body = {"model": "org/name", "steps": [LORA], "data": {"source": source}} | changes
    return running.client.post("/v1/jobs", json=body)


def refused(answer: httpx.Response, param: str = "data.source") -> str:
    problem = answer.json()
    assert answer.status_code == 422, problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert (problem["error"]["code"], problem["error"]["param"]) == ("data_unusable", param)
    return str(problem["detail"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", [*GOOD, "{"], "line 4 of the file is not JSON"),
        ("a.jsonl", [*GOOD, "[1]"], "line 4 of the file has none of `text`"),
        ("a.jsonl", [*GOOD, {"words": "x"}], "line 4 of the file has none of `text`"),
        ("a.jsonl", [*GOOD, "", {"prompt": "x"}], "line 5 has no `completion`"),
        ("a.jsonl", [*GOOD, {"prompt": "x", "completion": ""}], "line 4: `completion` is empty, so that nothing"),
        ("a.jsonl", [*GOOD, {"messages": [{"role": "user", "content": "x"}]}], "line 4 has no message of the assist"),
        ("a.jsonl", GOOD[:1], "one record; at least 2 are needed"),
        ("a.jsonl", [{"text": "x"}, {"text": None}], "one record; at least 2 are needed"),
        ("a.txt", b"one line", "one record; at least 2 are needed"),
        ("a.txt", b'[{"text": "x"}]', "one JSON array"),
    ],
)
def test_what_can_t_be_learned_from_is_refused_with_its_line(
    running: Running, name: str, content: bytes | list[Any], words: str
) -> None:
    source = uploaded(running, content, name)
    assert words in refused(submitted(running, source))
    assert running.client.get("/v1/jobs").json()["data"] == [] and waiting(running.service.queue, "cpu") == 0


def test_a_plan_of_what_a_teacher_is_to_write_knows_how_many_prompts_there_are(
    start: Callable[..., Running],
) -> None:
    model = Path(__file__).resolve().parents[2] / "models" / "bundled"
    running = start(model_roots=(model.parent,))
    step = {"kind": "distill", "method": "sequence", "student": {"layers": 1}, "steps": 5}
    seconds = []
    for count in (50, 500):
        source = uploaded(running, [{"prompt": f"{n} is", "completion": "a number"} for n in range(count)])
        body = {"model": str(model), "steps": [step], "data": {"source": source, "sequence_length": 512}}
        plan = running.client.post("/v1/plan", json=body).json()
        assert plan["feasible"], plan
        seconds.append(plan["seconds"]["stages"])
    assert 5 < seconds[1]["teaching"] / seconds[0]["teaching"] < 10
    assert seconds[1]["training"] == seconds[0]["training"]


HEAD = {"kind": "finetune", "method": "head"}
NAMED = [{"text": f"{n}", "label": "xy"[n % 2]} for n in range(4)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", [*NAMED, {"text": "b"}], "line 5 has no `label`"),
        ("a.jsonl", [*NAMED, {"text": "b", "label": 0.5}], "line 5: `label` is to be a string, a whole number or a"),
        ("a.jsonl", NAMED[::2], "all records have the label `x`"),
        ("a.jsonl", NAMED[:1], "one record; at least 2 are needed"),
        ("a.txt", b"many words " * 100, "plain text, which has no labels"),
    ],
)
def test_labels_are_looked_at_before_a_classifier_is_trained(
    shared: Running, name: str, content: bytes | list[Any], words: str
) -> None:
    assert words in refused(submitted(shared, uploaded(shared, content, name), steps=[HEAD]))


def test_labels_of_the_held_out_text_have_to_be_known_and_other_methods_read_past_them(shared: Running) -> None:
    good, other = uploaded(shared, NAMED), uploaded(shared, [{"text": "c", "label": "z"}])
    assert submitted(shared, good, steps=[HEAD]).status_code == 202
    assert submitted(shared, good, steps=[HEAD], evaluation={"source": good}).status_code == 202
    told = refused(submitted(shared, good, steps=[HEAD], evaluation={"source": other}), "evaluation.source")
    assert "no record to learn from has: `z`" in told
    assert submitted(shared, uploaded(shared, NAMED[::2])).status_code == 202, "text alone is what lora looks at"


def test_several_wrong_lines_are_told_at_once_but_not_endlessly(shared: Running) -> None:
    told = refused(submitted(shared, uploaded(shared, [*GOOD, "{", {"prompt": "x"}, GOOD[0], {"text": 3}])))
    assert [line.split(" of ")[0].split(" has")[0].split(":")[0] for line in told.splitlines()] == [
        "line 4",
        "line 5",
        "line 7",
    ]
    many = refused(submitted(shared, uploaded(shared, [*GOOD, *["{"] * 1000]))).splitlines()
    assert len(many) == 11 and many[0].startswith("line 4 ") and many[9].startswith("line 13 ")


def test_what_can_be_learned_from_is_taken(shared: Running) -> None:
    for name, content in (
        ("a.jsonl", GOOD),
        ("a.jsonl", [{"messages": [{"role": "assistant", "content": "hi"}]}] * 2),
        ("a.txt", b"many words " * 100),
        ("a.parquet", parquet(text=["one", None, "two"], more=[1, 2, 3])),
        ("a.parquet", parquet(messages=[[{"role": "assistant", "content": "hi"}]] * 2)),
    ):
        assert submitted(shared, uploaded(shared, content, name)).status_code == 202
    other = [{"body": "one"}, {"body": "two"}]
    source = uploaded(shared, [{"text": "x"}, *other])
    assert "line 1 of the file has none of `body`" in refused(
        submitted(shared, source, data={"source": source, "column": "body"})
    )
    own = uploaded(shared, [{"text": "x"}, {"words": 1}])
    quantizing = {"steps": [{"kind": "quantize", "method": "gptq"}]}
    assert submitted(shared, own, **quantizing).status_code == 202, "only what is trained on is held to this"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"text": ["one", "two", ""]}, "row 3: `text` is empty"),
        ({"text": ["one"]}, "one record; at least 2 are needed"),
        ({"text": [b"one", b"two"]}, "row 1: `text` is no text"),
        ({"body": ["one", "two"]}, "none of `text`, `prompt` and `completion`, or `messages` among its columns (body)"),
        ({"prompt": ["a", "b", "c"], "completion": ["x", "", None]}, "row 2: `completion` is empty, so that nothing"),
        ({"messages": [[{"role": "user", "content": "x"}]] * 2}, "row 1 has no message of the assistant"),
        (b"PAR1" + b"x" * 100, "damaged parquet"),
    ],
)
def test_wrong_rows_of_parquet_are_named_before_the_job_is_taken(
    shared: Running, content: bytes | dict[str, Any], words: str
) -> None:
    made = content if isinstance(content, bytes) else parquet(**content)
    assert words in refused(submitted(shared, uploaded(shared, made, "a.parquet")))


def test_labels_of_parquet_are_looked_at_too(shared: Running) -> None:
    good = parquet(text=["a", "b", "c"], label=["x", "y", "x"])
    assert submitted(shared, uploaded(shared, good, "a.parquet"), steps=[HEAD]).status_code == 202
    bad = parquet(text=["a", "b"], label=["x", "x"])
    assert "all records have the label `x`" in refused(
        submitted(shared, uploaded(shared, bad, "a.parquet"), steps=[HEAD])
    )


def test_several_wrong_rows_of_parquet_are_told_at_once(shared: Running) -> None:
    rows = ["one", "", "two", " ", "three"]
    told = refused(submitted(shared, uploaded(shared, parquet(text=rows), "a.parquet")))
    assert told.splitlines() == ["row 2: `text` is empty", "row 4: `text` is empty"]


def test_one_record_will_do_beside_a_held_out_text_which_is_looked_at_too(shared: Running) -> None:
    one, bad = uploaded(shared, GOOD[:1]), uploaded(shared, [*GOOD, {"prompt": "x"}])
    assert submitted(shared, one, evaluation={"source": one}).status_code == 202
    told = refused(submitted(shared, one, evaluation={"source": bad}), "evaluation.source")
    assert told == "line 4 has no `completion`; a prompt and its completion go together"


def test_of_a_large_file_the_beginning_alone_is_looked_at(start: Callable[..., Running]) -> None:
    running = start(max_upload_bytes=2 * CHECKED_BYTES)
    row = json.dumps({"text": "word " * 2000}).encode() + b"\n"
    rows = row * (CHECKED_BYTES // len(row) + 200)
    late = uploaded(running, rows + b"{\n")
    assert submitted(running, late).status_code == 202, "its last line is the worker's to refuse"
    early = refused(submitted(running, uploaded(running, row * 100 + b"{\n" + rows)))
    assert early.startswith("line 101 of the file is not JSON")


def test_a_file_that_is_not_there_is_refused_as_ever_and_a_repeated_request_needs_it_no_more(running: Running) -> None:
    answer = submitted(running, "file-00000000")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "spec_invalid")
    source, key = uploaded(running, GOOD), {"Idempotency-Key": "mine"}
    first = running.submit(key, steps=[LORA], data={"source": source})
    running.client.post(f"/v1/jobs/{first}/cancel")
    assert running.client.delete(f"/v1/files/{source}").status_code == 200
    assert running.submit(key, steps=[LORA], data={"source": source}) == first


def test_a_plan_names_wrong_lines_too(shared: Running) -> None:
    body = {"model": "/nowhere", "steps": [LORA], "data": {"source": uploaded(shared, [*GOOD, "{"])}}
    plan = Plan.model_validate(shared.client.post("/v1/plan", json=body).json())
    found = {obstacle.code: obstacle for obstacle in plan.obstacles}
    assert found["data_unusable"].param == "data.source" and "line 4" in found["data_unusable"].message
    assert "model_directory_forbidden" in found, "one obstacle does not hide the others"


def test_a_plan_tells_of_chats_without_a_template_and_of_a_model_without_room(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    running = start(model_roots=(tmp_path,))
    chats = [{"messages": [{"role": "assistant", "content": "hi"}]}] * 2
    source = uploaded(running, [GOOD[0], *chats])

    def obstacles(**files: dict[str, Any]) -> list[tuple[str | None, str]]:
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        body = {"model": str(tmp_path), "steps": [LORA], "data": {"source": source}}
        plan = Plan.model_validate(running.client.post("/v1/plan", json=body).json())
        return [(one.param, one.message) for one in plan.obstacles if one.code == "data_unusable"]

    ((param, message),) = obstacles(config={"model_type": "llama", "max_position_embeddings": 512})
    assert param == "data.source" and message.startswith("line 2 is a chat, and the model has no chat template")
    assert obstacles(tokenizer_config={"chat_template": "{{ messages }}"}) == []
    ((param, message),) = obstacles(config={"model_type": "llama", "max_position_embeddings": 8})
    assert param == "model" and "8 positions; at least 16" in message


PRUNE = {"kind": "prune", "method": "depth", "params_target": 0.9}
WEIGHED = [PRUNE, LORA | {"merge": True, "domain_column": "kind", "evaluate_every": 5}]
KINDS = [{"text": f"{n}", "kind": "xy"[n % 2]} for n in range(4)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", [*KINDS, {"text": "b"}], "line 5 has no `kind`, so that nobody knows which domain it is of"),
        ("a.jsonl", [*KINDS, {"text": "b", "kind": None}], "line 5 has no `kind`"),
        ("a.jsonl", [*KINDS, {"text": "b", "kind": 0.5}], "line 5: `kind` is to be a string, a whole number or a bool"),
        ("a.jsonl", [*KINDS, {"text": "b", "kind": " "}], "line 5: `kind` is empty"),
        ("a.jsonl", [*KINDS, {"words": "b", "kind": "x"}], "line 5 of the file has none of `text`"),
        ("a.jsonl", KINDS[::2], "all records have the kind `x`, so that there is nothing to weigh"),
        ("a.jsonl", KINDS[:3], "at least 2 records are needed"),
        ("a.jsonl", [{"text": "b", "kind": n} for n in range(90)], "`kind` names more than 64 domains"),
        ("a.txt", b"many words " * 100, "plain text, which names no domains"),
        ("a.parquet", {"text": ["a", "b"]}, "the file has no `kind` among its columns (text)"),
        ("a.parquet", {"text": ["a", "b", "c"], "kind": ["x", None, "y"]}, "row 2 has no `kind`"),
    ],
)
def test_domains_are_looked_at_before_they_are_weighed(
    shared: Running, name: str, content: bytes | list[Any] | dict[str, Any], words: str
) -> None:
    made = parquet(**content) if isinstance(content, dict) else content
    assert words in refused(submitted(shared, uploaded(shared, made, name), steps=WEIGHED))


def test_records_that_name_their_domain_are_taken_and_those_held_out_apart_must_have_each(shared: Running) -> None:
    good, chats = uploaded(shared, KINDS), [{"messages": [{"role": "assistant", "content": "hi"}]}] * 4
    assert submitted(shared, good, steps=WEIGHED).status_code == 202
    named = [one | {"kind": n % 2 == 0} for n, one in enumerate(chats)]
    assert submitted(shared, uploaded(shared, named), steps=WEIGHED).status_code == 202
    two = parquet(text=["a", "b", "c", "d"], kind=[1, 1, 2, 2])
    assert submitted(shared, uploaded(shared, two, "a.parquet"), steps=WEIGHED).status_code == 202
    once = uploaded(shared, KINDS[:2])
    assert submitted(shared, once, steps=WEIGHED, evaluation={"source": good}).status_code == 202
    for rows, words in ((KINDS[:1], "has no records of `y`"), ([*KINDS, {"text": "c", "kind": "z"}], "is of: `z`")):
        other = uploaded(shared, rows)
        told = refused(submitted(shared, good, steps=WEIGHED, evaluation={"source": other}), "evaluation.source")
        assert words in told


def test_domains_that_nothing_was_lost_of_are_refused_before_the_file_is_looked_at(shared: Running) -> None:
    answer = submitted(shared, uploaded(shared, KINDS), steps=WEIGHED[1:])
    assert answer.status_code == 422 and "nothing was taken from the model" in answer.json()["detail"]
