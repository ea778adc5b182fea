"""One worker: takes a job from its id to its end, and sweeps beside that."""

import errno
import re
import shutil
import threading
import time
from pathlib import Path

import structlog
from celery import Celery
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import files, history, lifecycle, listing
from jobs.database import Database
from jobs.lifecycle import Claim
from jobs.queue import enqueue, queue_of
from jobs.records import JobRecord
from jobs.settings import Settings
from jobs.sweeping import sweep_once
from squeeze.costs.pace import Past
from squeeze.errors import (
    DataUnusable,
    DiskFull,
    FileNotFound,
    JobNotFound,
    ModelNotFound,
    ServiceUnavailable,
    SqueezeError,
)
from squeeze.names import OWN_ID
from squeeze.objects import Status
from squeeze.steps.sharding import refuse_without_library
from squeeze.steps.training import Train
from storage import Storage
from workers.checkpoints import Safekeeping
from workers.ending import clear, settle
from workers.groups import Ledger
from workers.processors import devices_of
from workers.request import Request, StoredFile
from workers.scrub import secrets
from workers.spawn import ForkServer
from workers.supervise import Ending, Failed, Supervision

log = structlog.get_logger(__name__)


class Worker:
    """What `python -m workers` runs. Jobs run one at a time, in one thread; the sweep in another."""

    def __init__(
        self,
        settings: Settings,
        *,
        app: Celery,
        database: Database,
        storage: Storage,
        ledger: Ledger,
        server: ForkServer,
        name: str,
        device: str,
    ) -> None:
        self._settings = settings
        self.app = app
        self._database = database
        self._storage = storage
        self._device = device
        self._secrets = secrets(urls=(settings.database_url, settings.broker_url, settings.storage_url))
        self._ledger = ledger
        self.server = server
        self.name = name
        self.stopping = threading.Event()

    def run_job(self, job_id: str) -> Status | None:
        """The whole attempt: where the job went, or None where it was not, or is no longer, ours."""
        if self.stopping.is_set():
            return None  # the sweep of another worker rings again
        claimed_at = time.monotonic()
        try:
            with self._database.write() as session:
                claim = lifecycle.claim(session, job_id, worker=self.name, lease_seconds=self._settings.lease_seconds)
        except ServiceUnavailable as error:
            log.warning("the database can't be reached; the sweep will ring again", job_id=job_id, error=error.message)
            return None
        if claim is None:
            log.info("nothing to claim", job_id=job_id)
            return None
        ending = self._attempt(claim, claimed_at)
        status = settle(self._database, self._storage, claim, ending, max_attempts=self._settings.max_attempts)
        log.info("attempt ended", job_id=job_id, attempt=claim.attempt, status=status, how=type(ending.how).__name__)
        if status == Status.succeeded:
            shutil.rmtree(self._scratch(job_id), ignore_errors=True)
        elif status == Status.queued:
            self._ring(claim)
        if not self.stopping.is_set():
            self.server.start()  # warm again for the next job, should it have died with this one
        return status

    def sweep_forever(self) -> None:
        """Until the worker stops. Outages of the database and the broker are logged and outlived."""
        prepared = False
        while not self.stopping.is_set():
            try:
                if not prepared:
                    self._database.check()
                    self._clear_leavings()
                    prepared = True
                swept = sweep_once(self._database, self.app, max_attempts=self._settings.max_attempts)
                for job_id in (*swept.lost, *swept.cancelled):
                    clear(self._database, self._storage, job_id)
            except ServiceUnavailable as error:
                log.warning("no sweep this time", error=error.message)
            self.stopping.wait(self._settings.sweep_seconds)

    def _attempt(self, claim: Claim, claimed_at: float) -> Ending:
        try:
            request, past = self._request(claim), self._past(claim)
        except SqueezeError as error:
            return Ending(Failed(error), leased_until=claimed_at + self._settings.lease_seconds)
        supervision = Supervision(
            database=self._database,
            server=self.server,
            ledger=self._ledger,
            stopping=self.stopping,
            claim=claim,
            lease_seconds=self._settings.lease_seconds,
            errors=request.scratch_path / f"attempt-{claim.attempt}.log",
            keeping=Safekeeping(
                self._storage,
                claim.job_id,
                claim.attempt,
                request.scratch_path / "work",
                60 * self._settings.checkpoint_minutes or None,
            ),
            known_secrets=self._secrets,
            claimed_at=claimed_at,
            past=past,
        )
        try:
            return supervision.run(request.message())
        except OSError as error:
            return Ending(Failed(_unwritable(error)), leased_until=claimed_at + self._settings.lease_seconds)

    def _past(self, claim: Claim) -> list[Past]:
        """What jobs like this one took on devices like ours."""
        method = claim.spec.steps[-1].method
        with self._database.read() as session:
            return history.finished(session, method, gpu=self._device != "cpu")

    def _request(self, claim: Claim) -> Request:
        spec = claim.spec
        device, *others = devices_of(self._device, spec.limits.gpus)
        for number, step in enumerate(spec.steps):
            if isinstance(step, Train):
                refuse_without_library(step.sharding, f"steps.{number}.sharding")
        with self._database.read() as session:
            record = listing.find(session, claim.project, claim.job_id)
            models = {
                param: _source(session, claim, name, param) for param, name in spec.models.items() if OWN_ID.match(name)
            }
            data = {
                name: _data(session, claim, name, param)
                for name, param in ((spec.data.source, "data.source"), (spec.evaluation.source, "evaluation.source"))
                if name is not None and OWN_ID.match(name)
            }
        scratch = self._scratch(claim.job_id)
        for folder in (scratch, self._settings.cache):
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise _unwritable(error) from error
        return Request(
            job_id=claim.job_id,
            attempt=claim.attempt,
            spec=spec.model_dump(mode="json"),
            scratch=str(scratch),
            cache=str(self._settings.cache),
            storage_url=self._settings.storage_url,
            device=device,
            others=tuple(others),
            model_roots=tuple(str(root) for root in self._settings.model_roots),
            consumers={name: str(python) for name, python in self._settings.consumers.items()},
            activation_bytes=self._settings.activation_bytes,
            revision=record.model_revision,
            source=models.pop("model", ()),
            named=models,
            data=data,
        )

    def _scratch(self, job_id: str) -> Path:
        return self._settings.scratch / job_id

    def _ring(self, claim: Claim) -> None:
        try:
            enqueue(self.app, claim.job_id, queue_of(claim.spec), claim.spec.priority)
        except ServiceUnavailable as error:
            log.warning("the sweep will ring for the job", job_id=claim.job_id, error=error.message)

    def _clear_leavings(self) -> None:
        """Of killed workers: what they had stored in vain, and work directories that nobody will go on with."""
        for folder in self._settings.scratch.glob("job-*"):
            clear(self._database, self._storage, folder.name)
            with self._database.read() as session:
                status = session.scalar(select(JobRecord.status).where(JobRecord.id == folder.name))
            if status is None or status == Status.succeeded:
                log.info("work directory removed", job_id=folder.name)
                shutil.rmtree(folder, ignore_errors=True)


def safe_name(text: str) -> str:
    """A worker's name as a file's and a Celery node's name can be."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text).strip(".") or "worker"


def _unwritable(error: OSError) -> SqueezeError:
    kind = DiskFull if error.errno == errno.ENOSPC else ServiceUnavailable
    return kind(f"The worker can't write to its data directory ({error.strerror}). Look at its disk, then retry.")


def _source(session: Session, claim: Claim, name: str, param: str) -> tuple[StoredFile, ...]:
    """The first format's files of an earlier job of the same project. param: the field that names it."""
    try:
        record = listing.find(session, claim.project, name)
    except JobNotFound as error:
        raise ModelNotFound(f"there is no job {name} whose result could be compressed", param=param) from error
    if record.status != Status.succeeded:
        raise ModelNotFound(
            f"{name} is {record.status}, so there is no result to compress; wait until it has succeeded", param=param
        )
    kind = record.spec["formats"][0]
    return tuple(
        StoredFile(artifact.filename, artifact.storage_key, artifact.sha256, artifact.bytes)
        for artifact in listing.artifacts(session, claim.project, name)
        if artifact.format == kind
    )


def _data(session: Session, claim: Claim, file_id: str, param: str) -> StoredFile:
    try:
        record = files.find(session, claim.project, file_id)
    except FileNotFound as error:
        raise DataUnusable(f"there is no file {file_id}; upload it again", param=param) from error
    return StoredFile(record.filename, record.storage_key, record.sha256, record.bytes)
