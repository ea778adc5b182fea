"""Uploads over a real socket: forms in any order, what is taken, what is refused, and that nothing is left behind."""

import hashlib
import json
import socket
from collections.abc import Callable, Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.multipart import Form
from squeeze.errors import BodyInvalid
from squeeze.objects import File
from tests.api.serving import Running

JSONL = b'{"text": "one"}\n{"text": "two"}\n'


def _upload(running: Running, name: str, content: bytes, purpose: str | None = "calibration") -> httpx.Response:
    fields = {} if purpose is None else {"purpose": purpose}
    return running.client.post("/v1/files", data=fields, files={"file": (name, content)})


def _stored(running: Running) -> list[str]:
    return list(running.service.storage.list("files"))


def test_a_file_is_stored_listed_served_and_deleted(running: Running) -> None:
    answer = _upload(running, "texts.jsonl", JSONL)
    assert answer.status_code == 200, answer.text
    file = File.model_validate(answer.json())
    assert (file.filename, file.bytes, file.purpose) == ("texts.jsonl", len(JSONL), "calibration")
    assert file.sha256 == hashlib.sha256(JSONL).hexdigest()
    assert running.client.get(f"/v1/files/{file.id}").json() == answer.json()
    listed = running.client.get("/v1/files", params={"purpose": "calibration"}).json()
    assert [each["id"] for each in listed["data"]] == [file.id]
    assert running.client.get("/v1/files", params={"purpose": "training"}).json()["data"] == []
    content = running.client.get(f"/v1/files/{file.id}/content", headers={"Range": "bytes=2-5"})
    assert (content.status_code, content.content) == (206, JSONL[2:6])
    assert running.client.delete(f"/v1/files/{file.id}").json()["deleted"] is True
    assert running.client.get(f"/v1/files/{file.id}/content").status_code == 404
    assert _stored(running) == []


def test_a_file_that_a_job_needs_stays(running: Running) -> None:
    file_id = _upload(running, "texts.txt", b"some text").json()["id"]
    job_id = running.submit(data={"source": file_id})
    answer = running.client.delete(f"/v1/files/{file_id}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "file_in_use")
    running.client.post(f"/v1/jobs/{job_id}/cancel")
    assert running.client.delete(f"/v1/files/{file_id}").status_code == 200


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "ä text".encode()),
        ("a.TXT", b"x"),
        ("a.md", b"# x"),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("a.jsonl", b'\n\n{"text": "\xe2\x80\xa8", "id": 1}'),
        ("a.jsonl", b'{"prompt": "why?", "completion": "so"}'),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}'),
        ("a.jsonl", b'{"text": "' + b"x" * 200_000 + b'"}'),
        ("a.txt", b"x" * 65535 + "ä".encode()),
        ("a.parquet", b"PAR1....PAR1"),
    ],
)
def test_text_is_taken(shared: Running, name: str, content: bytes) -> None:
    answer = _upload(shared, name, content)
    assert answer.status_code == 200, answer.text
    assert shared.client.get(f"/v1/files/{answer.json()['id']}/content").content == content


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.txt", b" \n\t", "empty"),
        ("a.exe", b"MZ", ".jsonl"),
        ("noending", b"x", ".jsonl"),
        ("a.jsonl", b"plain text", "not JSON"),
        ("a.jsonl", b'["text"]', "`text`"),
        ("a.jsonl", b'{"txt": "x"}', "`text`"),
        ("a.jsonl", b"x" * 200_000, "no object"),
        ("a.txt", b"\xff\xfe\x00x", "UTF-8"),
        ("a.txt", b"a\0b", "zero bytes"),
        ("a.parquet", b"text", "PAR1"),
        ("folder/", b"x", "no file name"),
    ],
)
def test_what_is_no_text_is_refused_and_not_kept(shared: Running, name: str, content: bytes, words: str) -> None:
    before = _stored(shared)
    answer = _upload(shared, name, content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "data_unusable"), answer.text
    assert answer.json()["error"]["param"] == "file"
    assert words in answer.json()["detail"]
    assert _stored(shared) == before


def test_a_client_can_not_choose_where_a_file_lies(shared: Running) -> None:
    for name in ("../../etc/passwd.txt", "C:\\dir\\passwd.txt", "/etc/passwd.txt"):
        assert _upload(shared, name, b"x").json()["filename"] == "passwd.txt"


@pytest.mark.parametrize(("purpose", "words"), [(None, "missing"), ("models", "takes"), ("model", "can't be uploaded")])
def test_a_wrong_purpose_leaves_nothing_behind(shared: Running, purpose: str | None, words: str) -> None:
    before = _stored(shared)
    answer = _upload(shared, "a.txt", b"x", purpose)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "purpose")
    assert words in answer.json()["detail"]
    late = shared.client.post(  # the file comes first, so it was stored before the purpose was read
        "/v1/files", files=[("file", ("a.txt", b"x")), ("purpose", (None, purpose or "other"))]
    )
    assert late.status_code == 422
    assert _stored(shared) == before


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ({"Content-Type": "application/json"}, b"{}"),
        ({}, b"x"),
        ({"Content-Type": "multipart/form-data"}, b"x"),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b"no form"),
        ({"Content-Type": "multipart/form-data; boundary=" + "b" * 5000}, b"x"),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b""),
        (
            {"Content-Type": "multipart/form-data; boundary=b"},
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\nx',
        ),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b"--b--\r\n"),
        ({"Content-Type": "multipart/form-data; boundary=b"}, b"--b\r\nX: " + b"y" * 60000 + b"\r\n\r\n\r\n--b--\r\n"),
    ],
)
def test_a_form_that_can_not_be_read_is_refused(shared: Running, headers: dict[str, str], content: bytes) -> None:
    before = _stored(shared)
    answer = shared.client.post("/v1/files", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "body_invalid"), answer.text
    assert _stored(shared) == before


def test_a_file_past_the_limit_is_refused_while_it_streams(start: Callable[..., Running]) -> None:
    running = start(max_upload_bytes=100_000)
    answer = _upload(running, "a.txt", b"x" * 100_001)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert _upload(running, "a.txt", b"x" * 100_000).status_code == 200

    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 10_000

    header = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = running.client.post("/v1/files", content=endless(), headers=header)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert len(_stored(running)) == 1


def test_a_client_that_goes_away_leaves_nothing_behind(running: Running) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n' + b"x" * 300_000
    with socket.create_connection(running.address) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2000000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + head
        )
    answer = _upload(running, "after.txt", b"x")  # the service goes on
    assert answer.status_code == 200
    assert running.client.get("/v1/files").json()["first_id"] == answer.json()["id"]
    assert len(running.client.get("/v1/files").json()["data"]) == 1


def _form(boundary: bytes, parts: list[tuple[str, str | None, bytes]]) -> bytes:
    body = b""
    for name, filename, content in parts:
        extra = b"" if filename is None else f'; filename="{filename}"'.encode()
        body += b"--" + boundary + f'\r\nContent-Disposition: form-data; name="{name}"'.encode() + extra
        body += b"\r\n\r\n" + content + b"\r\n"
    return body + b"--" + boundary + b"--\r\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.sampled_from(["file", "purpose", "x"]), st.sampled_from([None, "a.txt"]), st.binary(max_size=300)),
        min_size=1,
        max_size=5,
    ),
    cut=st.integers(1, 50),
)
def test_a_form_reads_the_same_however_it_is_cut(parts: list[tuple[str, str | None, bytes]], cut: int) -> None:
    body = _form(b"bOuNd", parts)
    chunks = (body[at : at + cut] for at in range(0, len(body), cut))
    form = Form("multipart/form-data; boundary=bOuNd", chunks)
    read = [
        (part.name, part.filename, bytes(part.value) if part.filename is None else b"".join(form.data(part)))
        for part in form
    ]
    assert read == parts


@given(body=st.binary(max_size=400) | st.text('-b\r\n:;="x', max_size=200).map(str.encode))
def test_any_bytes_are_a_form_or_a_refusal(body: bytes) -> None:
    form = Form("multipart/form-data; boundary=b", iter([body]))
    try:
        for part in form:
            if part.filename is not None:
                list(form.data(part))
    except BodyInvalid as error:
        assert json.dumps(error.message)
