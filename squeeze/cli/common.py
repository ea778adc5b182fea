"""What every subcommand shares: the client for the chosen address, and `--json`."""

import click

from squeeze.client import Client


def client_of(ctx: click.Context) -> Client:
    """The client of this run, closed when the command ends."""
    client = Client(ctx.find_root().obj)
    ctx.find_root().call_on_close(client.close)
    return client


def command_hint(ctx: click.Context, rest: str) -> str:
    """How the user would type another command against the same service."""
    root = ctx.find_root()
    typed = root.get_parameter_source("url") == click.core.ParameterSource.COMMANDLINE
    return f"squeeze --url {root.obj} {rest}" if typed else f"squeeze {rest}"


def _asks_for_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta["squeeze.json"] = value
    return value


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_asks_for_json,
    help="Print what the service answers, as JSON; lists as one document a line. Errors come as JSON too.",
)
