"""Watches over the child of one attempt until it has ended: lease, progress, cancel, time limit, and how it died.

One loop in the task's own thread: it waits for the child's lines and the fork server's, and between them does what is
due. A database that can't be reached for a while is waited for as long as the lease lasts; after that another worker
may own the job, so the child is killed.
"""

import contextlib
import os
import selectors
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog

from jobs import lifecycle
from jobs.database import Database
from squeeze.costs.pace import Past, expected
from squeeze.errors import (
    AttemptStale,
    JobNotFound,
    ProcessKilled,
    RuntimeExceeded,
    ServiceUnavailable,
    SqueezeError,
    rebuild,
)
from squeeze.objects import FINAL, Stage, Status
from workers.channel import Channel, Message
from workers.checkpoints import Safekeeping
from workers.death import MemoryWatch, explain
from workers.fraction import Course
from workers.groups import Group, Ledger, send
from workers.scrub import scrub
from workers.spawn import Exited, Forked, ForkServer, ServerGone

GRACE_SECONDS = 3.0
POLL_SECONDS = 1.0
RELAY_SECONDS = 0.25
RETELL_SECONDS = 2.0  # after which the time left is told anew, though the child says nothing
_TICK_SECONDS = 0.25
_COPY_TICK_SECONDS = 0.05
_EVENTS_HELD = 1000  # while the database is away
_FORK_SECONDS = 120.0  # a cold server imports first
_ORDERLY_SECONDS = 1.0  # a signal to all of the service's processes reaches the child and us in any order

Why = Literal["cancelled", "released", "stale", "unleased", "overran"]
_NOT_OURS = ("stale", "unleased")


@dataclass(frozen=True)
class Done:
    """The child finished; what it says is stored, is stored."""

    manifest: Message


@dataclass(frozen=True)
class Failed:
    error: SqueezeError


@dataclass(frozen=True)
class Stopped:
    """We ended the child, for a reason that is not the job's fault."""

    why: Literal["cancelled", "released", "stale", "unleased"]


@dataclass(frozen=True)
class Ending:
    """leased_until: `time.monotonic()`. figures: what the child measured of itself, where it could still say.

    uploading: the child had begun to write to the storage.
    """

    how: Done | Failed | Stopped
    leased_until: float
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    figures: Message = field(default_factory=dict)
    uploading: bool = False


class Supervision:
    """One attempt's child, from the request to its end."""

    def __init__(
        self,
        *,
        database: Database,
        server: ForkServer,
        ledger: Ledger,
        stopping: threading.Event,
        claim: lifecycle.Claim,
        lease_seconds: float,
        errors: Path,
        keeping: Safekeeping,
        known_secrets: tuple[str, ...],
        claimed_at: float,
        past: Sequence[Past] = (),
    ) -> None:
        """claimed_at: `time.monotonic()` just before the claim, from which the lease counts. past: finished jobs, which
        the time left is estimated by, the newest first.
        """
        self._database = database
        self._server = server
        self._ledger = ledger
        self._stopping = stopping
        self._claim = claim
        self._lease_seconds = lease_seconds
        self._errors = errors
        self._keeping = keeping
        self._secrets = known_secrets
        self._past = past
        self._log = structlog.get_logger(__name__).bind(job_id=claim.job_id, attempt=claim.attempt)
        self._began = time.monotonic()
        self._leased_until = claimed_at + lease_seconds
        self._renew_at = claimed_at + lease_seconds / 3
        self._poll_at = self._relay_at = self._retell_at = self._began
        self._asked = False
        self._kill_at: float | None = None
        self._why: Why | None = None
        self._group: Group | None = None
        self._exited: Exited | None = None
        self._done: Message | None = None
        self._failed: Message | None = None
        self._figures: Message = {}
        self._events: list[tuple[str, str, dict[str, Any]]] = []
        self._progress: dict[str, Any] = {}
        self._course = Course()
        self._memory = MemoryWatch()

    def run(self, request: Message) -> Ending:
        """Starts the child, sends the request, returns once no process of it is left."""
        try:
            with self._errors.open("a") as errors:
                channel = self._server.fork(self._token, errors)
            try:
                self._watch(channel, request)
            finally:
                channel.close()
        except ServerGone as gone:
            self._log.error("fork server died", error=str(gone))
        finally:
            self._bury()
            try:
                self._keep_the_last()
            finally:
                self._keeping.end()
        return self._ending()

    @property
    def _token(self) -> str:
        return f"{self._claim.job_id}/{self._claim.attempt}"

    def _watch(self, channel: Channel, request: Message) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server, selectors.EVENT_READ)
            selector.register(channel, selectors.EVENT_READ)
            while self._exited is None:
                selector.select(_TICK_SECONDS)
                try:
                    for told in self._server.receive():
                        self._hear(told, channel, request)
                finally:  # even a server that died may have left a child that had said its last word
                    open_before = not channel.closed
                    for message in channel.drain():
                        self._take(message)
                if channel.closed and open_before:
                    selector.unregister(channel)
                self._act(time.monotonic())
        if self._why not in _NOT_OURS:
            self._relay_rest()

    def _hear(self, told: Forked | Exited, channel: Channel, request: Message) -> None:
        if told.token != self._token:
            return
        if isinstance(told, Exited):
            self._exited = told
            return
        self._group = told.group
        self._ledger.add(told.group)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # already dead: its end follows
            channel.send(request)

    def _take(self, message: Message) -> None:
        """One line of the child's."""
        match message:
            case {"expect": work}:
                method = self._claim.spec.steps[-1].method
                self._course.expect(expected(work, method, self._past), time.monotonic() - self._began)
            case {"stage": stage}:
                self._course.enter(Stage(stage), time.monotonic() - self._began)
                self._progress |= {"stage": Stage(stage), "done": None, "total": None, "unit": None}
            case {"advance": [done, total, unit]}:
                self._course.advance(done, total)
                self._progress |= {"done": done, "total": total, "unit": unit}
            case {"event": kind, "message": text, "data": data}:
                if len(self._events) < _EVENTS_HELD:
                    self._events.append((kind, scrub(text, self._secrets), data))
            case {"kept": checkpoint}:
                self._keeping.hold(Path(checkpoint))
            case {"revision": commit}:
                self._progress |= {"model_revision": commit}
            case {"failed": failed, "figures": figures}:
                self._failed, self._figures = failed, figures
                if "traceback" in message:
                    self._log.error("child failed", traceback=scrub(message["traceback"], self._secrets))
            case {"done": manifest, "figures": figures}:
                self._done, self._figures = manifest, figures
            case _:
                self._log.warning("child sent an unknown line", members=sorted(message))

    def _act(self, now: float) -> None:
        """Whatever is due."""
        self._keep_the_lease(now)
        self._keeping.act()
        if self._stopping.is_set():
            self._stop("released")
        elif now >= self._began + self._claim.spec.limits.max_runtime_seconds:
            self._stop("overran")
        self._press(now)

    def _keep_the_lease(self, now: float) -> None:
        """And hears what has become of the job, and tells how far it is."""
        try:
            if now >= self._renew_at:
                self._renew_at = now + min(POLL_SECONDS, self._lease_seconds / 3)  # the next try, should this one fail
                self._renew(now)
            if now >= self._poll_at:
                self._poll_at = now + POLL_SECONDS
                self._memory.look()
                self._poll()
            due = self._course.stage is not None and now >= self._retell_at
            if now >= self._relay_at and (self._events or self._progress or due):
                self._relay_at = now + RELAY_SECONDS
                self._relay()
        except ServiceUnavailable as error:
            self._log.warning("the database can't be reached; the job goes on", error=error.message)
        except (AttemptStale, JobNotFound):
            self._stop("stale")
        if now >= self._leased_until:
            self._stop("unleased")

    def _keep_the_last(self) -> None:
        """Of a job that somebody may go on with, the newest checkpoint is stored before it is anybody else's."""
        while self._done is None and self._keeping.busy and self._why not in (*_NOT_OURS, "cancelled"):
            self._keeping.act(now=True)
            self._keep_the_lease(time.monotonic())
            time.sleep(_COPY_TICK_SECONDS)

    def _press(self, now: float) -> None:
        """Ends the child where it is to end: asks first, then makes it; makes it at once where the job is not ours."""
        if self._group is None:
            if self._why == "released" or (self._why and now >= self._began + _FORK_SECONDS):
                raise ServerGone("no child was forked before it was to end")
        elif self._why in _NOT_OURS or (self._kill_at is not None and now >= self._kill_at):
            send(self._group, signal.SIGKILL)
        elif self._why and not self._asked:
            self._asked = True
            self._kill_at = now + GRACE_SECONDS
            send(self._group, signal.SIGTERM)
        elif (self._done or self._failed) and self._kill_at is None:
            self._kill_at = now + GRACE_SECONDS  # it has said its last word and only has to end

    def _renew(self, now: float) -> None:
        with self._database.write() as session:
            cancel = lifecycle.renew(session, self._claim.job_id, self._claim.attempt, self._lease_seconds)
        self._leased_until = now + self._lease_seconds
        self._renew_at = now + self._lease_seconds / 3
        if cancel:
            self._stop("cancelled")

    def _poll(self) -> None:
        with self._database.read() as session:
            record = lifecycle.find(session, self._claim.project, self._claim.job_id)
        if record.attempt != self._claim.attempt or record.status in FINAL or record.status == Status.queued:
            self._stop("stale")
        elif record.status == Status.cancelling:
            self._stop("cancelled")

    def _relay_rest(self) -> None:
        """What the child told last. The attempt's end does not wait for it."""
        try:
            self._relay()
        except (ServiceUnavailable, AttemptStale) as error:
            self._log.warning("the last progress was not told", error=error.message)

    def _relay(self) -> None:
        job, attempt = self._claim.job_id, self._claim.attempt
        now = time.monotonic()
        self._retell_at = now + RETELL_SECONDS
        with self._database.write() as session:
            for kind, text, data in self._events:
                lifecycle.note(session, job, attempt, kind, text, data)
            if self._course.stage is not None:
                lifecycle.progress(
                    session,
                    job,
                    attempt,
                    fraction=self._course.fraction,
                    eta_seconds=self._course.eta_seconds(now - self._began),
                    **self._progress,
                )
        self._events, self._progress = [], {}

    def _stop(self, why: Why) -> None:
        """The child is to end. The first reason stands, unless the job turns out not to be ours any more."""
        if self._why is None or (why in _NOT_OURS and self._why not in _NOT_OURS):
            self._log.info("stopping the child", why=why)
            self._why = why

    def _bury(self) -> None:
        """Makes sure that nothing of the child is left, whoever died first."""
        if self._group is not None:
            send(self._group, signal.SIGKILL)
            self._ledger.remove(self._group)

    def _ending(self) -> Ending:
        exited = self._exited
        peak_bytes = max(exited.peak_bytes if exited else 0, self._figures.get("peak_host_bytes", 0))
        return Ending(
            how=self._how(peak_bytes),
            cpu_seconds=exited.cpu_seconds if exited else 0.0,
            peak_bytes=peak_bytes,
            figures=self._figures,
            uploading=self._course.stage == Stage.uploading,
            leased_until=self._leased_until,
        )

    def _ended_with_us(self) -> bool:
        """Whether the child died of a SIGTERM that was meant for the whole service."""
        status = self._exited.status if self._exited else 0
        terminated = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        return terminated and self._why is None and self._stopping.wait(_ORDERLY_SECONDS)

    def _how(self, peak_bytes: int) -> Done | Failed | Stopped:
        if self._why in ("stale", "unleased", "cancelled"):
            return Stopped(self._why)
        if self._done is not None:
            return Done(self._done)
        if self._why == "released" or self._ended_with_us():
            return Stopped("released")
        if self._why == "overran":
            return Failed(
                RuntimeExceeded(
                    f"The job ran longer than its limits.max_runtime_seconds of "
                    f"{self._claim.spec.limits.max_runtime_seconds}. Submit it with a larger one; a retry goes on from "
                    "where it stopped.",
                    param="limits.max_runtime_seconds",
                )
            )
        if self._failed is not None:
            failed = self._failed
            return Failed(rebuild(failed["code"], scrub(failed["message"], self._secrets), failed["param"]))
        if self._exited is None:
            return Failed(
                ProcessKilled(
                    "The process that runs jobs was killed from outside. The job is tried again from where it stopped, "
                    "a few times at most."
                )
            )
        return Failed(
            explain(
                self._exited.status,
                out_of_memory=self._memory.ran_out(),
                peak_bytes=peak_bytes,
                errors=self._errors,
                known_secrets=self._secrets,
            )
        )
