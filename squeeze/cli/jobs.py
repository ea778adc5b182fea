"""Subcommands about jobs that were submitted: list, look, wait, cancel, download …"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from squeeze.cli import show
from squeeze.cli.common import client_of, command_hint, json_option
from squeeze.cli.watch import download as download_shown
from squeeze.cli.watch import watch
from squeeze.client import Client
from squeeze.objects import Status

into_option = click.option(
    "--download",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Then download the artifacts into this directory.",
)


def finish(ctx: click.Context, client: Client, job_id: str, *, directory: Path | None, as_json: bool) -> None:
    """Waits for the job, shows how it ended, downloads. Exit code 1 unless it succeeded; an interrupt lets it run."""
    try:
        job = watch(client, job_id)
    except KeyboardInterrupt:
        show.say(f"\nStopped watching. {job_id} goes on.")
        show.say(f"  watch it again:  {command_hint(ctx, f'wait {job_id}')}")
        show.say(f"  cancel it:       {command_hint(ctx, f'cancel {job_id}')}")
        ctx.exit(130)
    if as_json:
        show.as_json(job)
    else:
        show.job(job)
    if job.status is not Status.succeeded:
        ctx.exit(1)
    if directory is not None:
        download_shown(client, job_id, directory, format=None, parallel=1)


@click.command("jobs")
@click.option("--status", type=click.Choice([status.value for status in Status]), help="Only jobs of this status.")
@click.option("--kind", help="Only jobs with a step of this kind.")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="Only jobs with this; may be given several times.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many.")
@json_option
@click.pass_context
def jobs(
    ctx: click.Context, status: str | None, kind: str | None, metadata: Sequence[str], limit: int, as_json: bool
) -> None:
    """Lists jobs, newest first."""
    if any("=" not in pair for pair in metadata):
        raise click.BadParameter("write it as KEY=VALUE", ctx, param_hint="--metadata")
    wanted = dict(pair.split("=", 1) for pair in metadata)
    found = client_of(ctx).jobs.list(status=status, kind=kind, metadata=wanted, limit=limit)
    if as_json:
        show.as_json(found)
    else:
        show.jobs(found)


@click.command("show")
@click.argument("job_id")
@json_option
@click.pass_context
def show_one(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Shows one job."""
    _print_job(client_of(ctx).jobs.get(job_id), as_json)


@click.command()
@click.argument("job_id")
@into_option
@json_option
@click.pass_context
def wait(ctx: click.Context, job_id: str, directory: Path | None, as_json: bool) -> None:
    """Waits for a job's end, with a progress bar. Exit code 1 unless it succeeds."""
    finish(ctx, client_of(ctx), job_id, directory=directory, as_json=as_json)


@click.command()
@click.argument("job_id")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job ends.")
@click.option("--after", type=click.IntRange(0), default=0, help="Only events after the one of this number.")
@json_option
@click.pass_context
def events(ctx: click.Context, job_id: str, follow: bool, after: int, as_json: bool) -> None:
    """Prints what happened to a job."""
    found = client_of(ctx).jobs.events(job_id, after=after, follow=follow)
    if as_json:
        show.as_json(found)
        return
    for event in found:
        click.echo(show.event_line(event))


@click.command()
@click.argument("job_id")
@json_option
@click.pass_context
def cancel(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Cancels a queued or running job."""
    _print_job(client_of(ctx).jobs.cancel(job_id), as_json)


@click.command()
@click.argument("job_id")
@json_option
@click.pass_context
def retry(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Queues a failed or cancelled job again; it goes on from what its last attempt kept."""
    _print_job(client_of(ctx).jobs.retry(job_id), as_json)


@click.command()
@click.argument("job_id")
@json_option
@click.pass_context
def delete(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Removes a job that has ended, with its artifacts."""
    answer = client_of(ctx).jobs.delete(job_id)
    if as_json:
        show.as_json(answer)
    else:
        click.echo(f"{answer.id} and its artifacts are deleted")


@click.command()
@click.argument("job_id")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option("--format", help="Only this format's files.")
@click.option("--parallel", type=click.IntRange(1, 16), default=1, show_default=True, help="Files at the same time.")
@click.pass_context
def download(ctx: click.Context, job_id: str, directory: Path | None, format: str | None, parallel: int) -> None:
    """Downloads a job's artifacts into DIRECTORY (by default one named after the job).

    Goes on where an interrupted download stopped, and checks every file's SHA-256.
    """
    download_shown(client_of(ctx), job_id, directory or Path(job_id), format=format, parallel=parallel)


@click.command()
@click.argument("job_id")
@json_option
@click.pass_context
def report(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Prints what the job did to size, quality and speed."""
    answer = client_of(ctx).jobs.report(job_id)
    if as_json:
        show.as_json(answer)
    else:
        show.report(answer)


def _print_job(job: Any, as_json: bool) -> None:
    if as_json:
        show.as_json(job)
    else:
        show.job(job)


COMMANDS: Sequence[click.Command] = (jobs, show_one, wait, events, cancel, retry, delete, download, report)
