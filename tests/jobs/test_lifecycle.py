"""The life of a job: every move, legal or not, and who may make it."""

from collections.abc import Callable
from datetime import timedelta
from itertools import product
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import lifecycle, listing
from jobs.database import Database
from jobs.moves import MOVES, move
from jobs.records import JobRecord, now
from squeeze.errors import (
    ArtifactNotFound,
    AttemptStale,
    Conflict,
    HubUnavailable,
    JobFinal,
    JobNotFinal,
    JobNotFound,
    JobNotRetryable,
    MoveIllegal,
    NotFinite,
    ProcessKilled,
    ReportNotReady,
)
from squeeze.objects import Stage, Status, Usage
from tests.jobs.making import ARTIFACT, LEASE_SECONDS, REPORT, RESULT, USAGE, bring, claim, expire, publish, submit

Q, R, G, C, S, F = (
    Status.queued,
    Status.running,
    Status.cancelling,
    Status.cancelled,
    Status.succeeded,
    Status.failed,
)

ACTIONS: dict[str, Callable[[Session, JobRecord], Any]] = {
    "claim": lambda session, job: lifecycle.claim(session, job.id, worker="w", lease_seconds=1),
    "renew": lambda session, job: lifecycle.renew(session, job.id, job.attempt, 60),
    "progress": lambda session, job: lifecycle.progress(session, job.id, job.attempt, fraction=0.5),
    "note": lambda session, job: lifecycle.note(session, job.id, job.attempt, "info", "text", {}),
    "publish": lambda session, job: publish(session, job.id, job.attempt, ARTIFACT),
    "fail": lambda session, job: lifecycle.fail(session, job.id, job.attempt, NotFinite("NaN")),
    "fail, retryable": lambda session, job: lifecycle.fail(session, job.id, job.attempt, ProcessKilled("killed")),
    "cancelled": lambda session, job: lifecycle.cancelled(session, job.id, job.attempt),
    "release": lambda session, job: lifecycle.release(session, job.id, job.attempt),
    "cancel": lambda session, job: lifecycle.cancel(session, job.project, job.id),
    "retry": lambda session, job: lifecycle.retry(session, job.project, job.id),
    "delete": lambda session, job: lifecycle.delete(session, job.project, job.id),
}
# What becomes of a job: a status (its own: nothing changes), None (gone), or the error that is raised.
OUTCOMES: dict[str, dict[Status, Any]] = {
    "claim": {Q: R, R: R, G: G, C: C, S: S, F: F},
    "renew": {Q: AttemptStale, R: R, G: G, C: AttemptStale, S: AttemptStale, F: AttemptStale},
    "progress": {Q: AttemptStale, R: R, G: G, C: AttemptStale, S: AttemptStale, F: AttemptStale},
    "note": {Q: AttemptStale, R: R, G: G, C: AttemptStale, S: AttemptStale, F: AttemptStale},
    "publish": {Q: AttemptStale, R: S, G: C, C: AttemptStale, S: AttemptStale, F: AttemptStale},
    "fail": {Q: AttemptStale, R: F, G: C, C: AttemptStale, S: AttemptStale, F: AttemptStale},
    "fail, retryable": {Q: AttemptStale, R: Q, G: C, C: AttemptStale, S: AttemptStale, F: AttemptStale},
    "cancelled": {Q: AttemptStale, R: MoveIllegal, G: C, C: AttemptStale, S: AttemptStale, F: AttemptStale},
    "release": {Q: AttemptStale, R: Q, G: C, C: AttemptStale, S: AttemptStale, F: AttemptStale},
    "cancel": {Q: C, R: G, G: G, C: C, S: JobFinal, F: JobFinal},
    "retry": {Q: JobNotFinal, R: JobNotFinal, G: JobNotFinal, C: Q, S: JobNotRetryable, F: Q},
    "delete": {Q: JobNotFinal, R: JobNotFinal, G: JobNotFinal, C: None, S: None, F: None},
}


@pytest.mark.parametrize("action", ACTIONS)
def test_each_action_does_in_each_status_what_the_table_says(database: Database, action: str) -> None:
    for status in Status:
        expected = OUTCOMES[action][status]
        with database.write() as session:
            job_id = bring(session, status).id
        if isinstance(expected, type):
            with pytest.raises(expected), database.write() as session:
                ACTIONS[action](session, session.get_one(JobRecord, job_id))
            expected = status
        else:
            with database.write() as session:
                ACTIONS[action](session, session.get_one(JobRecord, job_id))
        with database.read() as session:
            after = session.get(JobRecord, job_id)
            assert (after and after.status) == expected, (action, status)


def test_every_move_outside_the_table_raises(sqlite_database: Database) -> None:
    for before, after in product(Status, Status):
        with sqlite_database.write() as session:
            record = bring(session, before)
            if after in MOVES[before]:
                move(session, record, after, now(), "legal")
                assert record.status == after
            else:
                with pytest.raises(MoveIllegal):
                    move(session, record, after, now(), "illegal")
                assert record.status == before


def test_every_change_of_status_leaves_an_event(database: Database) -> None:
    with database.write() as session:
        record = bring(session, C)
        lifecycle.retry(session, record.project, record.id)
        publish(session, record.id, claim(session, record.id).attempt)
    with database.read() as session:
        told = [(event.id, event.data["status"], event.attempt) for event in listing.events(session, record.id)]
    assert told == [
        (1, "queued", 0),
        (2, "running", 1),
        (3, "cancelling", 1),
        (4, "cancelled", 1),
        (5, "queued", 1),
        (6, "running", 2),
        (7, "succeeded", 2),
    ]


def test_a_claim_gives_the_spec_the_attempt_and_a_lease(database: Database) -> None:
    with database.write() as session:
        submitted = submit(session, seed=7, metadata={"team": "search"})
        before = now()
        claimed = claim(session, submitted.id, worker="host-1")
    assert (claimed.job_id, claimed.project, claimed.attempt) == (submitted.id, "default", 1)
    assert (claimed.spec.seed, claimed.spec.metadata) == (7, {"team": "search"})
    with database.read() as session:
        record = session.get_one(JobRecord, submitted.id)
        assert (record.status, record.worker, record.started_at) == (R, "host-1", claimed.started_at)
        assert record.lease_expires_at == claimed.started_at + timedelta(seconds=LEASE_SECONDS)
        assert claimed.created_at <= before <= claimed.started_at


def test_a_job_that_is_not_there_can_not_be_claimed(database: Database) -> None:
    with database.write() as session:
        assert lifecycle.claim(session, "job-00000000000000000000000000", worker="w", lease_seconds=1) is None


def test_renewing_moves_the_lease_and_tells_of_a_cancel(database: Database) -> None:
    with database.write() as session:
        record = bring(session, R)
        assert lifecycle.renew(session, record.id, 1, 1000.0) is False
        assert record.lease_expires_at is not None
        assert record.lease_expires_at > now() + timedelta(seconds=900)
        lifecycle.cancel(session, record.project, record.id)
        assert lifecycle.renew(session, record.id, 1, 1000.0) is True


def test_a_late_worker_still_owns_a_job_that_nobody_swept(database: Database) -> None:
    with database.write() as session:
        record = bring(session, R)
        expire(session, record)
        assert lifecycle.renew(session, record.id, 1, LEASE_SECONDS) is False
        assert lifecycle.sweep(session, now=now(), max_attempts=3).requeued == []


STALE: dict[str, Callable[[Session, str], Any]] = {
    "renew": lambda session, job: lifecycle.renew(session, job, 1, 60),
    "progress": lambda session, job: lifecycle.progress(session, job, 1, fraction=0.9),
    "note": lambda session, job: lifecycle.note(session, job, 1, "info", "late", {}),
    "publish": lambda session, job: publish(session, job, 1, ARTIFACT),
    "fail": lambda session, job: lifecycle.fail(session, job, 1, NotFinite("late"), USAGE),
    "cancelled": lambda session, job: lifecycle.cancelled(session, job, 1),
    "release": lambda session, job: lifecycle.release(session, job, 1),
}


@pytest.mark.parametrize("write", STALE)
def test_a_stale_attempt_changes_nothing(database: Database, write: str) -> None:
    with database.write() as session:
        record = bring(session, R)
        expire(session, record)
        lifecycle.sweep(session, now=now(), max_attempts=3)
        assert claim(session, record.id, worker="second").attempt == 2
    before = _everything(database)
    with pytest.raises(AttemptStale), database.write() as session:
        STALE[write](session, record.id)
    assert _everything(database) == before
    with database.write() as session:
        assert publish(session, record.id, 2, ARTIFACT)


def test_publishing_gives_report_result_usage_and_artifacts_at_once(database: Database) -> None:
    with database.write() as session:
        record = bring(session, R)
        with pytest.raises(ReportNotReady):
            listing.report(session, record.project, record.id)
        assert publish(session, record.id, 1, ARTIFACT)
    with database.read() as session:
        record = lifecycle.find(session, record.project, record.id)
        assert (record.status, record.fraction, record.worker, record.lease_expires_at) == (S, 1.0, None, None)
        assert record.finished_at is not None
        assert record.result == RESULT.model_dump(mode="json")
        assert record.usage == USAGE.model_dump(mode="json")
        assert listing.report(session, record.project, record.id) == REPORT
        assert [artifact.sha256 for artifact in listing.artifacts(session, record.project, record.id)] == ["00" * 32]
        found = listing.artifact(session, record.project, record.id, "gptq/model.safetensors")
        assert found.storage_key == ARTIFACT.storage_key
        for filename in ("model.safetensors", "", "a\0b"):
            with pytest.raises(ArtifactNotFound):
                listing.artifact(session, record.project, record.id, filename)


def test_a_publication_that_breaks_leaves_a_running_job_without_artifacts(database: Database) -> None:
    with database.write() as session:
        record = bring(session, R)
    before = _everything(database)
    twin = lifecycle.NewArtifact(**vars(ARTIFACT))
    with pytest.raises(Exception, match=r"(?i)unique"), database.write() as session:
        publish(session, record.id, 1, ARTIFACT, twin)
    assert _everything(database) == before
    with database.write() as session:
        assert publish(session, record.id, 1, ARTIFACT)


def test_a_job_that_is_being_cancelled_publishes_nothing(database: Database) -> None:
    with database.write() as session:
        record = bring(session, G)
        assert publish(session, record.id, 1, ARTIFACT) is False
        assert record.status == C
    with database.read() as session:
        assert listing.artifacts(session, record.project, record.id) == []
        with pytest.raises(ReportNotReady):
            listing.report(session, record.project, record.id)
        assert lifecycle.find(session, record.project, record.id).usage == USAGE.model_dump(mode="json")


def test_a_retryable_failure_is_tried_again_up_to_the_bound(database: Database) -> None:
    with database.write() as session:
        record = submit(session)
        for expected in (Q, Q, F):
            attempt = claim(session, record.id).attempt
            lifecycle.progress(session, record.id, attempt, stage=Stage.loading, fraction=0.4, model_revision="abc")
            assert lifecycle.fail(session, record.id, attempt, HubUnavailable("no answer"), USAGE, 3) == expected
            assert record.status == expected
        assert (record.attempt, record.crashes, record.model_revision) == (3, 3, "abc")
        assert record.error == {"code": "hub_unavailable", "message": "no answer", "retryable": True}
        assert record.usage == Usage(cpu_seconds=6.0, peak_host_bytes=100).model_dump(mode="json")


def test_a_failure_that_trying_again_can_not_mend_is_final(database: Database) -> None:
    with database.write() as session:
        record = bring(session, R)
        assert lifecycle.fail(session, record.id, 1, NotFinite("a\0b \udce9")) == F
    with database.read() as session:
        read = lifecycle.find(session, record.project, record.id)
        assert read.error == {"code": "not_finite", "message": "a\ufffdb ?", "retryable": False}
        assert (read.finished_at is not None, read.crashes) == (True, 0)


def test_retrying_forgets_the_crashes_and_the_error(database: Database) -> None:
    with database.write() as session:
        record = submit(session)
        lifecycle.fail(session, record.id, claim(session, record.id).attempt, ProcessKilled("killed"), None, 1)
        assert (record.status, record.crashes) == (F, 1)
        lifecycle.retry(session, record.project, record.id)
        assert (record.status, record.crashes, record.error, record.finished_at) == (Q, 0, None, None)
        assert claim(session, record.id).attempt == 2


def test_giving_a_job_back_is_no_crash(database: Database) -> None:
    with database.write() as session:
        record = bring(session, R)
        lifecycle.progress(session, record.id, 1, stage=Stage.compressing, fraction=0.5, done=3, total=8, unit="blocks")
        assert lifecycle.release(session, record.id, 1) == Q
        assert (record.crashes, record.stage, record.fraction, record.done, record.started_at) == (
            0,
            None,
            0,
            None,
            None,
        )


def test_the_sweep_requeues_jobs_of_lost_workers_up_to_the_bound(database: Database) -> None:
    with database.write() as session:
        lost, healthy, queued = bring(session, R, priority=2), bring(session, R), bring(session, Q)
        for _ in range(2):
            expire(session, lost)
            swept = lifecycle.sweep(session, now=now(), max_attempts=3)
            assert swept == lifecycle.Swept(requeued=[(lost.id, "cpu", 2)], lost=[], cancelled=[])
            claim(session, lost.id)
        expire(session, lost)
        assert lifecycle.sweep(session, now=now(), max_attempts=3) == lifecycle.Swept([], [lost.id], [])
        assert lost.error is not None
        assert (lost.status, lost.error["code"], lost.error["retryable"]) == (F, "worker_lost", True)
        assert (healthy.status, queued.status) == (R, Q)


def test_the_sweep_ends_a_cancel_whose_worker_is_lost(database: Database) -> None:
    with database.write() as session:
        record = bring(session, G)
        expire(session, record)
        assert lifecycle.sweep(session, now=now(), max_attempts=3) == lifecycle.Swept([], [], [record.id])
        assert (record.status, record.error) == (C, None)


def test_progress_keeps_what_is_not_given_and_a_new_stage_starts_at_nothing(database: Database) -> None:
    with database.write() as session:
        record = bring(session, R)
        lifecycle.progress(session, record.id, 1, stage=Stage.pulling, done=2, total=10**12, unit="bytes")
        lifecycle.progress(session, record.id, 1, done=3, eta_seconds=-1.0)
        assert (record.stage, record.done, record.total, record.unit) == (Stage.pulling, 3, 10**12, "bytes")
        assert record.eta_seconds == 0.0
        lifecycle.progress(session, record.id, 1, stage=Stage.loading, fraction=1.7)
        assert (record.stage, record.done, record.total, record.fraction) == (Stage.loading, None, None, 1.0)


def test_progress_tells_each_stage_and_each_whole_percent_once(database: Database) -> None:
    with database.write() as session:
        record = bring(session, R)
        for stage in (Stage.pulling, Stage.pulling, Stage.loading):
            lifecycle.progress(session, record.id, 1, stage=stage)
        for thousandth in range(1001):
            lifecycle.progress(session, record.id, 1, fraction=thousandth / 1000)
        session.flush()
        told = [event.type for event in listing.events(session, record.id, limit=1000)]
    assert told.count("stage") == 2
    assert told.count("progress") == 100


def test_deleting_removes_every_row_and_names_the_storage(database: Database) -> None:
    with database.write() as session:
        record = submit(session, metadata={"a": "b"})
        publish(session, record.id, claim(session, record.id).attempt, ARTIFACT)
    with database.write() as session:
        assert lifecycle.delete(session, record.project, record.id) == [f"jobs/{record.id}"]
    assert _everything(database) == {}
    with pytest.raises(JobNotFound), database.write() as session:
        lifecycle.delete(session, record.project, record.id)


def test_a_job_stays_while_another_starts_from_its_model(database: Database) -> None:
    with database.write() as session:
        source = bring(session, S)
        reader = submit(session, model=source.id)
        with pytest.raises(Conflict, match=reader.id):
            lifecycle.delete(session, source.project, source.id)
        lifecycle.cancel(session, reader.project, reader.id)
        assert lifecycle.delete(session, source.project, source.id)


def test_another_project_can_not_touch_a_job(database: Database) -> None:
    with database.write() as session:
        record = bring(session, F)
        for touch in (lifecycle.find, lifecycle.cancel, lifecycle.retry, lifecycle.delete, listing.artifacts):
            with pytest.raises(JobNotFound):
                touch(session, "other", record.id)
        with pytest.raises(JobNotFound):
            listing.report(session, "other", record.id)


def test_an_id_that_no_database_takes_is_not_found(database: Database) -> None:
    with database.write() as session:
        for job_id in ("", "job-\0", "j\udce9b", "x" * 10_000, "job-1' OR '1'='1"):
            for touch in (lifecycle.find, lifecycle.cancel, lifecycle.retry, lifecycle.delete):
                with pytest.raises(JobNotFound):
                    touch(session, "default", job_id)


def _everything(database: Database) -> dict[str, Any]:
    """All rows of the job tables, to see that nothing changed."""
    found: dict[str, Any] = {}
    with database.read() as session:
        for table in JobRecord.metadata.sorted_tables:
            rows = [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key))]
            if rows:
                found[table.name] = rows
    return found
