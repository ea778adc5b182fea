"""Events over a real socket: lists, the stream, reconnects, the end."""

import json
import threading
from collections.abc import Iterator

import httpx

from jobs import lifecycle
from squeeze.objects import Stage
from tests.api.serving import Running

STREAM = {"Accept": "text/event-stream"}


def _events(answer: httpx.Response) -> Iterator[dict[str, str]]:
    """The events of a stream as a browser would see them."""
    event: dict[str, str] = {}
    for line in answer.iter_lines():
        if not line:
            if event:
                yield event
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            event[name] = value


def test_the_list_goes_on_after_what_was_seen(running: Running) -> None:
    job_id = running.submit()
    running.client.post(f"/v1/jobs/{job_id}/cancel")
    running.client.post(f"/v1/jobs/{job_id}/retry")
    first = running.client.get(f"/v1/jobs/{job_id}/events", params={"limit": 2}).json()
    assert [event["id"] for event in first["data"]] == [1, 2]
    assert (first["has_more"], first["last_id"]) == (True, "2")
    rest = running.client.get(f"/v1/jobs/{job_id}/events", params={"after": first["last_id"]}).json()
    assert [event["data"]["status"] for event in rest["data"]] == ["queued"]
    assert not rest["has_more"]
    assert running.client.get(f"/v1/jobs/{job_id}/events", params={"after": 10**18}).json()["data"] == []


def test_the_stream_tells_what_happens_as_it_happens_and_ends_with_the_job(running: Running) -> None:
    job_id = running.submit()
    with running.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        stream = _events(answer)
        assert json.loads(next(stream)["data"])["data"]["status"] == "queued"
        with running.service.database.write() as session:  # the stream holds no session that this would wait for
            claim = lifecycle.claim(session, job_id, worker="w", lease_seconds=60)
            assert claim is not None
            lifecycle.progress(session, job_id, claim.attempt, stage=Stage.loading)
        assert [next(stream)["event"] for _ in range(2)] == ["status", "stage"]
        with running.service.database.write() as session:
            lifecycle.cancel(session, "default", job_id)
            lifecycle.cancelled(session, job_id, claim.attempt)
        last = list(stream)
    assert [json.loads(event["data"])["data"]["status"] for event in last] == ["cancelling", "cancelled"]
    listed = running.client.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert json.loads(last[-1]["data"]) == listed[-1]
    assert int(last[-1]["id"]) == listed[-1]["id"]


def test_a_reader_that_reconnects_misses_nothing_and_hears_nothing_twice(running: Running) -> None:
    job_id = running.submit()
    running.client.post(f"/v1/jobs/{job_id}/cancel")
    path = f"/v1/jobs/{job_id}/events"
    with running.client.stream("GET", path, headers=STREAM) as answer:
        first = next(_events(answer))
    with running.client.stream("GET", path, headers={**STREAM, "Last-Event-ID": first["id"]}) as answer:
        rest = list(_events(answer))
    assert [first["id"], *(event["id"] for event in rest)] == ["1", "2"]
    over = running.client.get(path, headers={**STREAM, "Last-Event-ID": rest[-1]["id"]})
    assert (over.status_code, over.content) == (204, b"")
    odd = running.client.get(path, headers={**STREAM, "Last-Event-ID": "no number"})
    assert odd.text.count("id: ") == 2


def test_a_stream_of_an_unknown_job_is_a_problem(shared: Running) -> None:
    answer = shared.client.get("/v1/jobs/job-00000000/events", headers=STREAM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")


def test_streams_end_when_the_service_or_the_job_goes(running: Running) -> None:
    job_id, deleted = running.submit(), running.submit()
    ended: list[str] = []
    begun = threading.Barrier(3)

    def follow(name: str) -> None:
        with httpx.stream("GET", f"{running.url}/v1/jobs/{name}/events", headers=STREAM, timeout=20) as answer:
            stream = _events(answer)
            next(stream)
            begun.wait(20)
            list(stream)
        ended.append(name)

    threads = [threading.Thread(target=follow, args=(name,)) for name in (job_id, deleted)]
    for thread in threads:
        thread.start()
    begun.wait(20)
    running.client.post(f"/v1/jobs/{deleted}/cancel")
    running.client.delete(f"/v1/jobs/{deleted}")
    threads[1].join(20)
    assert ended == [deleted]
    running.service.stopping.set()
    threads[0].join(20)
    assert ended == [deleted, job_id]
