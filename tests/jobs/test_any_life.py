"""Whatever happens to jobs in whatever order, the rules of their life hold."""

import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from jobs import lifecycle, listing
from jobs.database import Database
from jobs.moves import MOVES, OWNED
from jobs.records import JobRecord, now
from squeeze.errors import AttemptStale, Conflict, HubUnavailable, NotFinite
from squeeze.objects import FINAL, Stage, Status
from tests.jobs.making import ARTIFACT, USAGE, expire, publish, submit

MAX_ATTEMPTS = 2
WHICH = st.integers(0, 2)  # of three jobs
BEHIND = st.integers(0, 1)  # attempts that the writing worker is late


class Life(RuleBasedStateMachine):
    """Three jobs, and users, workers (some of them stale) and sweeps that do to them what they can."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="squeeze-life-")
        shutil.copy(self.template, Path(self.directory.name) / "squeeze.db")
        self.database = Database(f"sqlite:///{self.directory.name}/squeeze.db")
        self.published: dict[str, int] = {}

    @initialize()
    def submit_three(self) -> None:
        with self.database.write() as session:
            self.ids = [submit(session).id for _ in range(3)]

    @rule(which=WHICH)
    def claim(self, which: int) -> None:
        with self.database.write() as session:
            was = session.get_one(JobRecord, self.ids[which]).status
            claimed = lifecycle.claim(session, self.ids[which], worker="w", lease_seconds=60)
            assert (claimed is not None) == (was == Status.queued)

    @rule(which=WHICH, behind=BEHIND, write=st.sampled_from(["renew", "progress", "note", "release", "fail", "crash"]))
    def work(self, which: int, behind: int, write: str) -> None:
        with self.database.write() as session:
            record = session.get_one(JobRecord, self.ids[which])
            owns = record.status in OWNED and not behind
            job, attempt = record.id, record.attempt - behind
            try:
                if write == "renew":
                    assert lifecycle.renew(session, job, attempt, 60) == (record.status == Status.cancelling)
                elif write == "progress":
                    lifecycle.progress(session, job, attempt, stage=Stage.loading, fraction=0.5)
                elif write == "note":
                    lifecycle.note(session, job, attempt, "info", "text", {})
                elif write == "release":
                    lifecycle.release(session, job, attempt)
                else:
                    error = NotFinite("NaN") if write == "fail" else HubUnavailable("no answer")
                    lifecycle.fail(session, job, attempt, error, USAGE, MAX_ATTEMPTS)
                assert owns
            except AttemptStale:
                assert not owns

    @rule(which=WHICH, behind=BEHIND)
    def finish(self, which: int, behind: int) -> None:
        with self.database.write() as session:
            record = session.get_one(JobRecord, self.ids[which])
            was, attempt = record.status, record.attempt - behind
            try:
                if publish(session, record.id, attempt, ARTIFACT):
                    assert was == Status.running
                    self.published[record.id] = self.published.get(record.id, 0) + 1
                else:
                    assert was == Status.cancelling
                assert not behind
            except AttemptStale:
                assert behind or was not in OWNED

    @rule(which=WHICH, deed=st.sampled_from([lifecycle.cancel, lifecycle.retry]))
    def ask(self, which: int, deed: object) -> None:
        with self.database.write() as session:
            was = session.get_one(JobRecord, self.ids[which]).status
            try:
                deed(session, "default", self.ids[which])  # type: ignore[operator]
                assert was != Status.succeeded
            except Conflict:
                assert (was in FINAL) == (deed is lifecycle.cancel) or was == Status.succeeded

    @rule(which=WHICH)
    def lose_worker(self, which: int) -> None:
        with self.database.write() as session:
            record = session.get_one(JobRecord, self.ids[which])
            if record.status in OWNED:
                expire(session, record)
            swept = lifecycle.sweep(session, now=now(), max_attempts=MAX_ATTEMPTS)
            assert len(swept.requeued + swept.lost + swept.cancelled) <= 1

    @rule(which=WHICH)
    def replace(self, which: int) -> None:
        with self.database.write() as session:
            if session.get_one(JobRecord, self.ids[which]).status in FINAL:
                lifecycle.delete(session, "default", self.ids[which])
                self.ids[which] = submit(session).id

    @invariant()
    def the_rows_agree(self) -> None:
        with self.database.read() as session:
            for job_id in self.ids:
                record = session.get_one(JobRecord, job_id)
                assert (record.worker is not None) == (record.lease_expires_at is not None) == (record.status in OWNED)
                assert (record.finished_at is not None) == (record.status in FINAL)
                assert (record.error is not None) == (record.status == Status.failed)
                assert (record.result is not None) == (record.status == Status.succeeded)
                assert len(listing.artifacts(session, "default", job_id)) == (record.status == Status.succeeded)
                assert self.published.get(job_id, 0) == (record.status == Status.succeeded)
                assert 0 <= record.crashes <= MAX_ATTEMPTS
                events = listing.events(session, job_id, limit=10_000)
                assert [event.id for event in events] == list(range(1, record.last_event + 1))
                path = [Status(event.data["status"]) for event in events if event.type == "status"]
                assert path[0] == Status.queued
                assert path[-1] == record.status
                assert all(after in MOVES[before] for before, after in pairwise(path))
                assert path.count(Status.running) == record.attempt

    def teardown(self) -> None:
        self.database.dispose()
        self.directory.cleanup()


def test_any_order_of_deeds_keeps_the_rules(_migrated_sqlite: Path) -> None:
    Life.template = _migrated_sqlite
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.slow
def test_any_long_order_of_deeds_keeps_the_rules(_migrated_sqlite: Path) -> None:
    Life.template = _migrated_sqlite
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=100, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
