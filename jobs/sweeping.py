"""The sweep as it runs every few seconds, in any number of processes: ends lost attempts, sends lost messages again."""

from collections.abc import Mapping
from datetime import datetime, timedelta

import structlog
from celery import Celery
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs.database import Database
from jobs.lifecycle import Swept, sweep
from jobs.queue import QUEUES, enqueue, waiting
from jobs.records import JobRecord, now
from squeeze.objects import Status

log = structlog.get_logger()

SETTLED_SECONDS = 5.0  # a message is sent right after its commit; past this it was lost
OVERDUE_SECONDS = 600.0
_MOST_AT_ONCE = 1000


def sweep_once(database: Database, app: Celery, *, max_attempts: int) -> Swept:
    """One sweep. Raises ServiceUnavailable when the database or the broker does not answer: the next one may."""
    at = now()
    with database.write() as session:
        swept = sweep(session, now=at, max_attempts=max_attempts)
    for job_id in swept.lost:
        log.warning("worker lost too often", job_id=job_id)
    for message in swept.requeued:
        log.warning("worker lost, job queued again", job_id=message[0])
        enqueue(app, *message)
    messages: dict[str, int] = {queue: waiting(app, queue) for queue in QUEUES}
    with database.write() as session:
        unsent = unanswered(session, now=at, waiting=messages)
    for message in unsent:
        log.info("message sent again", job_id=message[0])
        enqueue(app, *message)
    return swept


def unanswered(session: Session, *, now: datetime, waiting: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """(job_id, queue, priority) of queued jobs whose message must be lost; they count as sent from now on.

    waiting: messages in each queue. When there is none, whatever was sent some seconds ago is lost. When there are
    some, but fewer than jobs, those sent long ago are taken for lost; when there are as many, the queue is just long,
    and a second message for each job would only make it longer.
    """
    lost: list[JobRecord] = []
    for queue, messages in waiting.items():
        queued = (JobRecord.status == Status.queued, JobRecord.queue == queue)
        if messages and messages >= (session.scalar(select(func.count()).where(*queued)) or 0):
            continue
        sent_before = now - timedelta(seconds=OVERDUE_SECONDS if messages else SETTLED_SECONDS)
        lost += session.scalars(
            select(JobRecord)
            .where(*queued, JobRecord.enqueued_at < sent_before)
            .order_by(JobRecord.id)
            .limit(_MOST_AT_ONCE)
            .with_for_update(skip_locked=True)
            .execution_options(populate_existing=True)
        )
    for record in lost:
        record.enqueued_at = now
    return [(record.id, record.queue, record.priority) for record in lost]
