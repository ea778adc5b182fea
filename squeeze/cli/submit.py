"""`squeeze quantize` and its like, one command for every kind of step; `squeeze plan`; `squeeze methods`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import ValidationError

from squeeze.cli import show
from squeeze.cli.common import client_of, command_hint, json_option
from squeeze.cli.jobs import finish
from squeeze.cli.options import OneOf, given, method_name, option, step_options
from squeeze.client import Client, Purpose
from squeeze.errors import SpecInvalid
from squeeze.names import Format
from squeeze.specs.job_spec import Data, Evaluation, JobSpec, Limits
from squeeze.steps.every import STEPS, Method
from squeeze.steps.training import Train

NO_FILE = re.compile(r"^(file-[0-9a-z]{8,64}|hub:.*|self)$")
TO_UPLOAD = "file-toupload"  # in the place of an id that is not there yet
NAMES_A_MODEL = (
    "MODEL is a Hub id (org/name or org/name@revision), an earlier job (job-…) or a directory of the service."
)


def commands() -> list[click.Command]:
    """One command for every kind of step that the wire knows: `quantize`, `finetune` …"""
    kinds: dict[str, list[Method]] = {}
    for method in STEPS:
        kinds.setdefault(str(get_args(method.model_fields["kind"].annotation)[0]), []).append(method)
    return [_command(kind, some) for kind, some in kinds.items()]


def _command(kind: str, some: Sequence[Method]) -> click.Command:
    @click.pass_context
    def submit(ctx: click.Context, /, waits: bool, directory: Path | None, as_json: bool, **values: Any) -> None:
        client = client_of(ctx)
        job = client.jobs.create(spec_of(client, values, some))
        if waits or directory is not None:
            finish(ctx, client, job.id, directory=directory, as_json=as_json)
        elif as_json:
            show.as_json(job)
        else:
            click.echo(f"{job.id} is {job.status.value}; watch it: {command_hint(ctx, f'wait {job.id}')}")

    waiting = [
        click.Option(["--wait", "waits"], is_flag=True, help="Wait for the end, with a progress bar."),
        click.Option(
            ["--download", "directory"],
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="Wait, then download the artifacts into this directory.",
        ),
    ]
    command = click.Command(
        kind,
        callback=submit,
        params=[*spec_parameters(some), *waiting],
        help=f"Submits a job with one step: {kind}.\n\n{NAMES_A_MODEL}",
    )
    return json_option(command)


@click.pass_context
def _plan(ctx: click.Context, /, as_json: bool, **values: Any) -> None:
    client = client_of(ctx)
    answer = client.plan(spec_of(client, values, STEPS))
    if as_json:
        show.as_json(answer)
    else:
        show.plan(answer)


@click.command()
@json_option
@click.pass_context
def methods(ctx: click.Context, as_json: bool) -> None:
    """Lists what the service can do."""
    answer = client_of(ctx).methods()
    if as_json:
        show.as_json(iter(answer))
    else:
        show.methods(answer)


def spec_parameters(some: Sequence[Method]) -> list[click.Parameter]:
    """Everything that describes the job, and no more: the step's parameters, the data, the formats, the limits."""
    source = (
        "A file to upload (JSONL with a text field, plain text, parquet), the id of one that is uploaded, or a Hub "
        "dataset (hub:org/name[:split])"
    )
    data, evaluation = Data.model_fields, Evaluation.model_fields
    return [
        click.Argument(["model"]),
        click.Option(["--method"], type=OneOf([*map(method_name, some)]), required=True, help="How to do it."),
        *step_options(some),
        click.Option(
            ["--format", "formats"],
            type=OneOf(get_args(Format)),
            multiple=True,
            help="A format to write; may be given several times. [default: compressed-tensors]",
        ),
        click.Option(
            ["--data", "data_source"],
            metavar="FILE",
            help=f"Text to train, calibrate and evaluate on. {source}; or self: the model samples what calibrates it.",
        ),
        option("data_column", data["column"]),
        option("samples", data["samples"]),
        option("sequence_length", data["sequence_length"]),
        click.Option(
            ["--evaluation-data", "evaluation_source"], metavar="FILE", help=f"Text to evaluate on. {source}."
        ),
        option("evaluation_column", evaluation["column"]),
        option("evaluation_samples", evaluation["samples"]),
        option("evaluation_stride", evaluation["stride"]),
        option("perplexity", evaluation["perplexity"]),
        option("divergence", evaluation["divergence"]),
        *(option(name, field) for name, field in Limits.model_fields.items()),
        *(option(name, JobSpec.model_fields[name]) for name in ("seed", "priority")),
        click.Option(["--metadata"], metavar="KEY=VALUE", multiple=True, callback=_pairs, help="Yours; for lists."),
    ]


def _pairs(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise click.BadParameter(f"write {value!r} as KEY=VALUE", ctx, param)
    return dict(value.split("=", 1) for value in values)


def spec_of(client: Client, values: dict[str, Any], some: Sequence[Method]) -> JobSpec:
    """The job that the options describe, checked as the service will check it; files are uploaded after the check."""
    method = next(one for one in some if method_name(one) == values["method"])
    every = {name for one in some for name in one.model_fields}
    step = given(values, [*every]) | {"kind": get_args(method.model_fields["kind"].annotation)[0]}
    data = given(values, ["samples", "sequence_length"])
    evaluation = given(values, ["perplexity", "divergence"])
    for name in ("samples", "stride"):
        if values[f"evaluation_{name}"] is not None:
            evaluation[name] = values[f"evaluation_{name}"]
    texts: dict[str, tuple[dict[str, Any], Purpose]] = {
        "data": (data, "training" if issubclass(method, Train) else "calibration"),
        "evaluation": (evaluation, "evaluation"),
    }
    for name, (part, _) in texts.items():
        if values[f"{name}_column"] is not None:
            part["column"] = values[f"{name}_column"]
        if (source := values[f"{name}_source"]) is not None:
            part["source"] = source if _is_no_file(source) else TO_UPLOAD
    fields = given(values, ["model", "formats", "seed", "priority", "metadata"])
    parts = {"data": data, "evaluation": evaluation, "limits": given(values, [*Limits.model_fields])}
    described: dict[str, Any] = fields | {name: part for name, part in parts.items() if part} | {"steps": [step]}
    checked(described)
    for name, (part, purpose) in texts.items():
        if part.get("source") == TO_UPLOAD:
            part["source"] = _uploaded(client, values[f"{name}_source"], purpose, f"{name}.source")
    return checked(described)


def checked(described: dict[str, Any]) -> JobSpec:
    try:
        return JobSpec.model_validate(described)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        # Inside a step pydantic's location has the tag of the method, which is nothing that the user wrote.
        where = ".".join(str(part) for part in first["loc"] if "." not in str(part))
        option_name = "--" + where.split(".")[-1].replace("_", "-") if where else "the command line"
        said = f"{described['steps'][0]['method']} takes none" if first["type"] == "extra_forbidden" else first["msg"]
        raise SpecInvalid(f"{option_name}: {said}", param=where or None) from wrong


def _is_no_file(source: str) -> bool:
    """An id, a dataset or `self`, unless a file here has that name."""
    return bool(NO_FILE.match(source)) and not Path(source).exists()


def _uploaded(client: Client, value: str, purpose: Purpose, param: str) -> str:
    """The id of a file of this machine, which is uploaded."""
    if not Path(value).is_file():
        raise SpecInvalid(
            f"{value} is neither a file here, nor the id of an uploaded one (file-…), nor a dataset (hub:org/name)",
            param=param,
        )
    uploaded = client.files.upload(value, purpose)
    show.say(f"Uploaded {value} as {uploaded.id}")
    return uploaded.id


plan = json_option(
    click.Command(
        "plan",
        callback=_plan,
        params=spec_parameters(STEPS),
        help=f"Says what a job would need and what stands in its way; runs nothing.\n\n{NAMES_A_MODEL}",
    )
)
