"""Downloads: whole, resumed, checked, confined."""

import hashlib
import random
from pathlib import Path

import pytest

from squeeze import Client, errors
from squeeze.download import place
from tests.client.faults import Cut, Falsify, Proxy, Refuse
from tests.client.service import Service

SIZE = 3_000_000


@pytest.fixture
def files() -> dict[str, bytes]:
    draw = random.Random(1)
    return {
        "gptq/model.safetensors": draw.randbytes(SIZE),
        "gptq/config.json": b'{"a": 1}',
        "compressed-tensors/empty": b"",
        "report.json": b"{}",
    }


@pytest.fixture
def job_id(client: Client, service: Service, files: dict[str, bytes], tmp_path: Path) -> str:
    job = client.jobs.create(model="squeeze/bundled", steps=[{"kind": "quantize", "method": "rtn"}])
    service.succeed(job.id, service.start(job.id), files, tmp_path)
    return job.id


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("parallel", [1, 3])
def test_everything_arrives_as_it_was_published(
    client: Client, job_id: str, files: dict[str, bytes], tmp_path: Path, parallel: int
) -> None:
    seen: dict[str, int] = {}
    paths = client.jobs.download(
        job_id,
        tmp_path / "out",
        parallel=parallel,
        on_bytes=lambda artifact, done: seen.__setitem__(artifact.filename, done),
    )
    assert contents(tmp_path / "out") == files
    assert sorted(paths) == sorted(tmp_path / "out" / name for name in files)
    assert seen["gptq/model.safetensors"] == SIZE


def test_one_format_can_be_asked_for(client: Client, job_id: str, tmp_path: Path) -> None:
    client.jobs.download(job_id, tmp_path / "out", format="gptq")
    assert contents(tmp_path / "out").keys() == {"gptq/model.safetensors", "gptq/config.json"}


def test_a_connection_that_breaks_again_and_again_costs_no_byte_twice(
    unlucky: Client, faulty: Proxy, job_id: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    faulty.on = "model.safetensors"
    faulty.faults = [Cut(1_000_000), Refuse(503), Cut(1_000_000)]
    unlucky.jobs.download(job_id, tmp_path / "out")
    assert contents(tmp_path / "out") == files
    ranges = [seen.headers.get("Range") for seen in faulty.seen if faulty.on in seen.path]
    assert ranges == [None, "bytes=1000000-", "bytes=1000000-", "bytes=2000000-"]
    conditions = [seen.headers.get("If-Range") for seen in faulty.seen if faulty.on in seen.path]
    assert conditions[0] is None and conditions[1] is not None and conditions[1] == conditions[3]


def test_a_later_call_goes_on_where_an_earlier_one_was_interrupted(
    client: Client, faulty: Proxy, job_id: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    class Enough(Exception):
        pass

    def interrupt(_: object, done: int) -> None:
        if done > 1_500_000:
            raise Enough

    with Client(faulty.url) as first, pytest.raises(Enough):
        first.jobs.download(job_id, tmp_path / "out", format="gptq", on_bytes=interrupt)
    part = tmp_path / "out" / "gptq" / "model.safetensors.part"
    size = part.stat().st_size
    assert 0 < size < SIZE
    faulty.seen.clear()
    with Client(faulty.url) as second:
        second.jobs.download(job_id, tmp_path / "out")
    assert contents(tmp_path / "out") == files
    assert [s.headers.get("Range") for s in faulty.seen if "model.safetensors" in s.path] == [f"bytes={size}-"]


def test_what_is_there_already_is_not_asked_for_again_and_what_differs_is_replaced(
    unlucky: Client, faulty: Proxy, job_id: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    unlucky.jobs.download(job_id, tmp_path / "out")
    (tmp_path / "out" / "gptq" / "config.json").write_bytes(b'{"a": 2}')
    faulty.seen.clear()
    unlucky.jobs.download(job_id, tmp_path / "out")
    assert contents(tmp_path / "out") == files
    assert [seen.path.rsplit("/", 1)[1] for seen in faulty.seen] == ["artifacts", "config.json"]


def test_a_part_of_something_else_is_thrown_away(
    client: Client, job_id: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    part = tmp_path / "out" / "gptq" / "model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    part.with_name(part.name + ".etag").write_text('"of an older file"')
    client.jobs.download(job_id, tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_a_spoiled_part_is_noticed_by_its_digest_and_fetched_anew(
    client: Client, faulty: Proxy, job_id: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    faulty.on = "model.safetensors"
    faulty.faults = [Falsify()]
    with Client(faulty.url) as unlucky:
        unlucky.jobs.download(job_id, tmp_path / "out")
    assert contents(tmp_path / "out") == files


def test_bytes_that_are_never_right_are_never_kept(
    unlucky: Client, faulty: Proxy, job_id: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    faulty.on = "model.safetensors"
    faulty.faults = [Falsify()] * 5
    with pytest.raises(errors.DownloadCorrupt) as wrong:
        unlucky.jobs.download(job_id, tmp_path / "out", format="gptq")
    assert hashlib.sha256(files["gptq/model.safetensors"]).hexdigest() in wrong.value.message
    assert "gptq/model.safetensors" not in contents(tmp_path / "out")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "", "a\\b", "a\0b", "C:x", "."])
def test_a_name_can_not_lead_out_of_the_directory(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.DownloadCorrupt):
        place(tmp_path, name)


def test_a_link_can_not_lead_out_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gptq").symlink_to(tmp_path)
    with pytest.raises(errors.DownloadCorrupt, match="link"):
        place(tmp_path / "out", "gptq/model.safetensors")
    assert place(tmp_path / "out", "other/file") == tmp_path / "out" / "other" / "file"
