"""`squeeze files`: text to calibrate and to evaluate on."""

from pathlib import Path
from typing import get_args

import click

from squeeze.cli import show
from squeeze.cli.common import client_of, json_option
from squeeze.client import Purpose


@click.group()
def files() -> None:
    """Uploads, lists and deletes text to calibrate and to evaluate on."""


@files.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--purpose", type=click.Choice(get_args(Purpose)), default="calibration", show_default=True)
@json_option
@click.pass_context
def upload(ctx: click.Context, path: Path, purpose: Purpose, as_json: bool) -> None:
    """Uploads a JSONL, plain text or parquet file and prints its id."""
    answer = client_of(ctx).files.upload(path, purpose)
    if as_json:
        show.as_json(answer)
    else:
        click.echo(answer.id)


@files.command("list")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@json_option
@click.pass_context
def list_files(ctx: click.Context, limit: int, as_json: bool) -> None:
    """Lists the uploaded files, newest first."""
    found = client_of(ctx).files.list(limit=limit)
    if as_json:
        show.as_json(found)
    else:
        show.files(found)


@files.command()
@click.argument("file_id")
@json_option
@click.pass_context
def delete(ctx: click.Context, file_id: str, as_json: bool) -> None:
    """Deletes an uploaded file that no job still needs."""
    answer = client_of(ctx).files.delete(file_id)
    if as_json:
        show.as_json(answer)
    else:
        click.echo(f"{answer.id} is deleted")
