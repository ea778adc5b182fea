"""`python -m jobs`: migrate the database, run the embedded broker, make and revoke API keys."""

import click
import structlog

from jobs import broker, keys
from jobs.database import Database
from jobs.settings import Settings
from squeeze.errors import SqueezeError


class _Plain(click.Group):
    """Shows our own errors as one line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except SqueezeError as error:
            raise click.ClickException(error.message) from error


@click.group(cls=_Plain)
@click.pass_context
def main(context: click.Context) -> None:
    """What an operator does besides starting the service. Settings come from SQUEEZE_* variables."""
    context.obj = Settings.from_environment()


@main.command()
@click.pass_obj
def migrate(settings: Settings) -> None:
    """Brings the database's schema to this version; does nothing when it is there already."""
    database = Database(settings.database_url)
    database.migrate()
    database.dispose()
    structlog.get_logger().info("database migrated")


@main.command("broker")
@click.pass_obj
def run_broker(settings: Settings) -> None:
    """Runs the embedded broker in the foreground, on a socket in SQUEEZE_DATA."""
    broker.run(settings.data)


@main.group("keys")
def keys_group() -> None:
    """API keys. While there is none, the service is open on loopback and listens nowhere else."""


@keys_group.command()
@click.option("--project", default="default", show_default=True, help="Whose jobs and files the key opens.")
@click.option("--name", required=True, help="For yourself: who or what uses the key.")
@click.pass_obj
def create(settings: Settings, project: str, name: str) -> None:
    """Makes a key and prints it, once: only its hash is kept."""
    with _migrated(settings).write() as session:
        record, plaintext = keys.create(session, project, name)
    click.echo(f"{record.id} of project {record.project}; keep it now, it is not shown again:", err=True)
    click.echo(plaintext)


@keys_group.command("list")
@click.option("--project", help="Of this project alone.")
@click.pass_obj
def list_all(settings: Settings, project: str | None) -> None:
    """Lists keys by their first characters."""
    with _migrated(settings).read() as session:
        for record in keys.list_keys(session, project):
            state = "revoked" if record.revoked_at else "active"
            used = record.last_used_at.isoformat(timespec="seconds") if record.last_used_at else "never used"
            click.echo("\t".join((record.id, record.project, record.prefix + "…", state, used, record.name)))


@keys_group.command()
@click.argument("key_id")
@click.pass_obj
def revoke(settings: Settings, key_id: str) -> None:
    """Revokes a key for good; KEY_ID as `keys list` shows it."""
    with _migrated(settings).write() as session:
        record = keys.revoke(session, key_id)
    click.echo(f"{record.id} is revoked", err=True)


def _migrated(settings: Settings) -> Database:
    database = Database(settings.database_url)
    database.migrate()
    return database


if __name__ == "__main__":
    main(prog_name="python -m jobs")
