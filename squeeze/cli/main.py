"""The `squeeze` command: its subcommands, and the edge where an error becomes a message and an exit code."""

import errno
import json
from typing import Any

import click

from squeeze import __version__
from squeeze.cli import files, jobs, submit
from squeeze.cli.show import say
from squeeze.errors import SqueezeError

WRONG_REQUEST, UNREACHABLE, INTERRUPTED = 2, 3, 130


class Edge(click.Group):
    """A group that turns what Squeeze and the file system raise into a line on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SqueezeError as error:
            _tell(ctx, error.code, error.message, error.param)
            ctx.exit(exit_code(error))
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            _tell(ctx, "local_file", str(error), None)
            ctx.exit(WRONG_REQUEST)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


def exit_code(error: SqueezeError) -> int:
    """2: ask differently. 3: ask later, or elsewhere."""
    return UNREACHABLE if error.retryable else WRONG_REQUEST


@click.group(cls=Edge, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="squeeze")
@click.option(
    "--url", envvar="SQUEEZE_URL", show_envvar=True, help="Address of the service. [default: http://127.0.0.1:8000]"
)
@click.pass_context
def main(ctx: click.Context, url: str | None) -> None:
    """Makes language models smaller, cheaper and faster, on a Squeeze service.

    An API key is read from SQUEEZE_API_KEY.

    Exit codes: 0 done; 1 the job failed or was cancelled; 2 the command line or the request is wrong, or a local file
    can't be read or written; 3 the service can't be reached or can't answer; 130 interrupted.
    """
    ctx.obj = url


def _tell(ctx: click.Context, code: str, message: str, param: str | None) -> None:
    if ctx.meta.get("squeeze.json"):
        click.echo(json.dumps({"error": {"code": code, "message": message, "param": param}}), err=True)
        return
    say(f"Error: {message}" + (f" [{param}]" if param and param not in message else "") + f" ({code})")


for command in (*submit.commands(), *jobs.COMMANDS, submit.plan, submit.methods, files.files):
    main.add_command(command)
