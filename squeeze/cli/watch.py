"""Waiting and downloading with something to look at: a bar on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from squeeze.cli.show import console, event_line, printable, progress_text, say, seconds_text
from squeeze.client import Client
from squeeze.errors import ConnectionFailed, ServiceUnavailable
from squeeze.objects import FINAL, Artifact, Job

PLAIN_STEP = 0.1


def watch(client: Client, job_id: str) -> Job:
    """Waits for the job's end, showing its progress and its warnings on standard error."""
    with _bar() if sys.stderr.isatty() else _lines() as show:
        seen = 0

        def on_poll(job: Job) -> None:
            nonlocal seen
            show(job)
            try:
                for event in client.jobs.events(job_id, after=seen, follow=False):
                    seen = event.id
                    if event.type == "warning":
                        say(event_line(event))
            except (ConnectionFailed, ServiceUnavailable):
                return  # the wait goes on, and asks again

        return client.jobs.wait(job_id, on_poll=on_poll)


def download(client: Client, job_id: str, directory: Path, *, format: str | None, parallel: int) -> None:
    """Downloads what the job published, with a bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        rows: dict[str, TaskID] = {}

        def on_bytes(artifact: Artifact, done: int) -> None:
            if artifact.filename not in rows:
                rows[artifact.filename] = progress.add_task(printable(artifact.filename), total=artifact.bytes)
            progress.update(rows[artifact.filename], completed=done)

        paths = client.jobs.download(job_id, directory, format=format, parallel=parallel, on_bytes=on_bytes)
    size = sum(path.stat().st_size for path in paths)
    say(f"{len(paths)} files, {decimal(size)}, with the right SHA-256, are in {directory}")


@contextmanager
def _bar() -> Iterator[Callable[[Job], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[left]}"),
    )
    with Progress(*columns, console=console(stderr=True)) as progress:
        task = progress.add_task("queued", total=1.0, left="")

        def show(job: Job) -> None:
            now = job.progress
            stage = job.stage.value if job.stage and job.status not in FINAL else job.status.value
            counted = f" {now.done}/{now.total} {now.unit}" if now.done is not None and now.unit else ""
            left = f"about {seconds_text(now.eta_seconds)} left" if now.eta_seconds is not None else ""
            done = 1.0 if job.status == "succeeded" else now.fraction
            progress.update(task, description=printable(stage + counted), completed=done, left=left)

        yield show


@contextmanager
def _lines() -> Iterator[Callable[[Job], None]]:
    last: tuple[object, ...] = ()

    def show(job: Job) -> None:
        nonlocal last
        now = (job.status, job.stage, int(job.progress.fraction / PLAIN_STEP), job.attempt)
        if now != last:
            say(f"{job.id}  {progress_text(job)}")
        last = now

    yield show
