"""Lists: pages that stay stable while jobs come and go, filters, counts, and what the wire shows of it."""

from datetime import UTC

import pytest

from jobs import lifecycle, listing, views
from jobs.database import Database
from jobs.records import new_id
from squeeze.errors import CursorInvalid
from squeeze.objects import Job, Status
from tests.jobs.making import ARTIFACT, MODEL, bring, claim, publish, submit


def test_ids_sort_by_age_even_within_one_millisecond() -> None:
    ids = [new_id("job") for _ in range(10_000)]
    assert ids == sorted(set(ids))
    assert {len(job_id) for job_id in ids} == {len("job-") + 26}
    assert set("".join(ids)) <= set("job-0123456789abcdefghjkmnpqrstvwxyz")


def test_pages_give_each_job_once_newest_first_while_others_arrive(database: Database) -> None:
    with database.write() as session:
        made = [submit(session).id for _ in range(11)]
        submit(session, project="theirs")
    seen: list[str] = []
    more = True
    while more:
        with database.write() as session:
            records, more = lifecycle.list_jobs(session, "default", after=seen[-1] if seen else None, limit=3)
            seen += [record.id for record in records]
            submit(session)
    assert seen == made[::-1]


def test_a_page_that_ends_exactly_at_the_last_job_has_no_more(database: Database) -> None:
    with database.write() as session:
        for _ in range(4):
            submit(session)
        assert [lifecycle.list_jobs(session, "default", limit=limit)[1] for limit in (3, 4, 5)] == [True, False, False]
        assert lifecycle.list_jobs(session, "nobody", limit=3) == ([], False)


@pytest.mark.parametrize("cursor", ["", "job-00000000000000000000000000", "x\0", "zzz", "file-1"])
def test_an_unknown_cursor_is_refused(database: Database, cursor: str) -> None:
    with database.read() as session, pytest.raises(CursorInvalid):
        lifecycle.list_jobs(session, "default", after=cursor)


def test_another_projects_cursor_is_unknown(database: Database) -> None:
    with database.write() as session:
        theirs = submit(session, project="theirs")
        with pytest.raises(CursorInvalid):
            lifecycle.list_jobs(session, "default", after=theirs.id)


def test_jobs_are_filtered_by_status_kind_and_metadata(database: Database) -> None:
    with database.write() as session:
        plain = submit(session)
        running = bring(session, Status.running, metadata={"team": "search", "run": "1"})
        odd = submit(session, metadata={"team": "search", 'quote"d.[0]': "ü\"'%", "run": "2"})

        def listed(**filters: object) -> list[str]:
            return [record.id for record in lifecycle.list_jobs(session, "default", **filters)[0]]

        assert listed(status=Status.running) == [running.id]
        assert listed(kind="quantize") == [odd.id, running.id, plain.id]
        assert listed(kind="prune") == listed(kind="\0") == []
        assert listed(metadata={"team": "search"}) == [odd.id, running.id]
        assert listed(metadata={"team": "search", "run": "1"}) == [running.id]
        assert listed(metadata={'quote"d.[0]': "ü\"'%"}) == [odd.id]
        assert listed(metadata={"team": "SEARCH"}) == listed(metadata={"te%": "search"}) == []
        assert listed(metadata={"team\0": "search"}) == listed(metadata={"team": "\0"}) == []
        assert listed(status=Status.queued, kind="quantize", metadata={"team": "search"}) == [odd.id]
        assert listed(after=odd.id, metadata={"team": "search"}) == [running.id]


def test_events_are_read_past_a_number_however_large(database: Database) -> None:
    with database.write() as session:
        record = bring(session, Status.cancelled)
        session.flush()
        ids = [[event.id for event in listing.events(session, record.id, after, 2)] for after in (-5, 0, 2, 4, 2**80)]
    assert ids == [[1, 2], [1, 2], [3, 4], [], []]


def test_counts_are_by_queue_and_status(database: Database) -> None:
    with database.write() as session:
        for status in (Status.queued, Status.queued, Status.failed):
            bring(session, status)
        submit(session, project="theirs", limits={"gpus": 1})
        assert listing.count(session) == {
            ("cpu", Status.queued): 2,
            ("cpu", Status.failed): 1,
            ("gpu", Status.queued): 1,
        }


@pytest.mark.parametrize("status", Status)
def test_a_job_in_every_status_has_a_wire_form_that_reads_back(database: Database, status: Status) -> None:
    with database.write() as session:
        record = bring(session, status, metadata={"team": "search"}, priority=-3)
    with database.read() as session:
        job = views.job(lifecycle.find(session, "default", record.id))
    assert Job.model_validate_json(job.model_dump_json()) == job
    assert (job.id, job.status, job.model, job.priority, job.metadata) == (
        record.id,
        status,
        MODEL,
        -3,
        {"team": "search"},
    )
    assert job.created_at.tzinfo == UTC
    assert (job.error is not None) == (status == Status.failed)
    assert (job.result is not None) == (status == Status.succeeded)


def test_events_and_artifacts_have_wire_forms(database: Database) -> None:
    spaced = lifecycle.NewArtifact(**vars(ARTIFACT) | {"filename": "gptq/a b?.json"})
    with database.write() as session:
        record = submit(session)
        publish(session, record.id, claim(session, record.id).attempt, ARTIFACT, spaced)
    with database.read() as session:
        events = [views.event(event) for event in listing.events(session, record.id)]
        artifacts = [views.artifact(artifact) for artifact in listing.artifacts(session, "default", record.id)]
    assert [(event.type, event.data["status"]) for event in events] == [
        ("status", "queued"),
        ("status", "running"),
        ("status", "succeeded"),
    ]
    assert [artifact.download_url for artifact in artifacts] == [
        f"/v1/jobs/{record.id}/artifacts/gptq/a%20b%3F.json",
        f"/v1/jobs/{record.id}/artifacts/gptq/model.safetensors",
    ]
