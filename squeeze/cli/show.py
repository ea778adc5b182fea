"""How answers look on a terminal: tables, one line for an event, one line for a job's progress."""

import sys
from collections.abc import Iterable, Sequence

import click
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from squeeze.objects import Duration, Event, File, Job, Method, Plan
from squeeze.reports.report import Factoring, Report, Round, Slimming
from squeeze.reports.training import Domain, Training
from squeeze.reports.vocabulary import Trimming
from squeeze.reports.words import size_text, step_text

WIDTH_WITHOUT_TERMINAL = 160
TASKS = {"prompt": "reading a prompt", "writing": "writing"}


def console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def say(text: str) -> None:
    """A line for the user, beside the results: to standard error."""
    click.echo(printable(text), err=True)


def as_json(answer: BaseModel | Iterable[BaseModel]) -> None:
    """One answer as JSON, or several as one JSON document a line."""
    if isinstance(answer, BaseModel):
        click.echo(answer.model_dump_json(indent=2))
        return
    for one in answer:
        click.echo(one.model_dump_json())


def printable(text: str) -> str:
    """Without control characters: what a service or a model's name holds must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def jobs(some: Iterable[Job]) -> None:
    rows = (
        (job.id, progress_text(job), job.model, recipe_text(job), f"{job.created_at:%Y-%m-%d %H:%M}") for job in some
    )
    _table(("job", "status", "model", "steps", "created (UTC)"), rows)


def job(one: Job) -> None:
    revision = f" at {one.model_revision}" if one.model_revision else ""
    lines = [
        ("job", one.id),
        ("status", progress_text(one)),
        ("model", one.model + revision),
        ("steps", recipe_text(one)),
        ("formats", ", ".join(one.formats)),
        ("attempt", str(one.attempt)),
        ("created", f"{one.created_at:%Y-%m-%d %H:%M:%S} UTC"),
    ]
    if one.result is None:
        lines += [("saves" if number == 0 else "", told) for number, told in enumerate(one.saves)]
    if one.started_at and one.finished_at:
        lines.append(("took", seconds_text((one.finished_at - one.started_at).total_seconds())))
    if one.result:
        sizes = ", ".join(f"{decimal(size)} as {name}" for name, size in one.result.result_bytes.items())
        ratio = one.result.compression_ratio
        smaller = "" if ratio is None else f" (weights {size_text(ratio)})"
        lines.append(("size", f"{decimal(one.result.source_bytes)} -> {sizes}{smaller}"))
        if one.result.bits_per_weight is not None:
            lines.append(("bits a weight", f"{one.result.bits_per_weight:.2f}"))
        if one.result.sparsity is not None:
            lines.append(("zeros", f"{one.result.sparsity:.1%} of all parameters, which take as many bytes"))
        if one.result.loss_before is not None and one.result.loss_after is not None:
            lines.append(("held-out loss", change_text(one.result.loss_before, one.result.loss_after)))
        if one.result.accuracy_before is not None and one.result.accuracy_after is not None:
            lines.append(("accuracy", f"{one.result.accuracy_before:.1%} -> {one.result.accuracy_after:.1%}"))
        if one.result.perplexity_before and one.result.perplexity_after:
            lines.append(("perplexity", change_text(one.result.perplexity_before, one.result.perplexity_after)))
        lines += [
            (f"{name} in {consumer}", outcome)
            for name, outcomes in one.result.certified.items()
            for consumer, outcome in outcomes.items()
        ]
    if one.error:
        again = " Trying again may help: squeeze retry " + one.id if one.error.retryable else ""
        lines.append(("error", f"{one.error.message} ({one.error.code}){again}"))
    _pairs(lines)


def report(one: Report) -> None:
    revision = f" at {one.source.revision}" if one.source.revision else ""
    lines = [("model", one.source.model + revision), ("weights", f"{one.source.parameters:,} in {one.source.dtype}")]
    lines += [(f"step {n}", step_text(step)) for n, step in enumerate(one.recipe)]
    for size in one.sizes:
        lines.append(
            (f"size as {size.format}", f"{decimal(one.source.bytes)} -> {decimal(size.weight_bytes)} of weights")
        )
        smaller = "" if size.ratio is None else f"{size_text(size.ratio)}, "
        lines.append(("", f"{smaller}{decimal(size.bytes)} with everything"))
    if one.bits_per_weight is not None:
        lines.append(("bits a weight", f"{one.bits_per_weight:.2f} in the compressed layers, scales counted in"))
    if one.sparsity is not None:
        stored = f"{decimal(one.sparsity.zstd_bytes)} under zstd (before: {decimal(one.sparsity.zstd_bytes_before)})"
        lines.append(("zeros", f"{one.sparsity.reached:.1%} of {one.sparsity.layers} layers' weights; {stored}"))
    for earlier in one.rounds:
        lines += _round_lines(earlier, [str(one.recipe[step]["method"]) for step in earlier.steps])
    if one.slimming is not None:
        lines += _slimming_lines(one.slimming)
    if one.factoring is not None:
        lines += _factoring_lines(one.factoring)
    if one.training is not None:
        lines += _training_lines(one.training)
    quality = one.quality
    if quality and quality.perplexity_before and quality.perplexity_after:
        lines.append(("perplexity", change_text(quality.perplexity_before, quality.perplexity_after)))
    if quality and quality.divergence_nats is not None:
        lines.append(("divergence", f"{quality.divergence_nats:.5f} nats a token from the original"))
    if quality and quality.top1_agreement is not None:
        lines.append(("agreement", f"{quality.top1_agreement:.2%} of the likeliest tokens are the same"))
    if quality:
        lines.append(("measured on", f"{quality.scored_tokens:,} tokens of {quality.text.origin}"))
    for certificate in one.certificates:
        seen = (
            certificate.outcome if certificate.outcome == "passed" else f"{certificate.outcome}: {certificate.detail}"
        )
        lines.append((f"{certificate.format} in {certificate.consumer}", seen))
    stages = ", ".join(f"{stage} {seconds_text(seconds)}" for stage, seconds in one.spent.seconds.items())
    lines.append(("took", f"{seconds_text(sum(one.spent.seconds.values()))} ({stages})"))
    memory = f"{decimal(one.spent.peak_host_bytes)} on the host"
    if one.spent.peak_gpu_bytes:
        memory += f", {decimal(one.spent.peak_gpu_bytes)} on the GPU"
    lines.append(("peak memory", memory))
    lines += [("warning", warning) for warning in one.warnings]
    _pairs(lines)


def plan(one: Plan) -> None:
    lines = [("can run", "yes, as far as can be seen" if one.feasible else "no")]
    lines += [(obstacle.param or "obstacle", f"{obstacle.message} ({obstacle.code})") for obstacle in one.obstacles]
    lines += [("saves" if number == 0 else "", told) for number, told in enumerate(one.saves)]
    if one.parameters is not None:
        lines.append(("weights", f"{one.parameters:,}"))
    if one.result_parameters is not None:
        about = "about " if one.result_parameters_estimated else ""
        lines.append(("weights left", f"{about}{one.result_parameters:,}"))
    lines += [(f"size as {name}", f"about {decimal(size)}") for name, size in one.result_bytes.items()]
    known = (("source", one.source_bytes), ("host memory", one.host_bytes), ("disk", one.disk_bytes))
    lines += [(name, f"about {decimal(size)}") for name, size in known if size is not None]
    if one.host_bytes and one.least_host_bytes and one.least_host_bytes < one.host_bytes:
        lines.append(("", f"{decimal(one.least_host_bytes)} of memory will do; activations then go to disk"))
    if one.seconds is not None:
        lines += _duration_lines(one.seconds)
    _pairs(lines)


def _duration_lines(seconds: Duration) -> list[tuple[str, str]]:
    low, likely, high = (seconds_text(each) for each in (seconds.low, seconds.likely, seconds.high))
    stages = ", ".join(f"{stage} {seconds_text(each)}" for stage, each in seconds.stages.items())
    return [
        ("time", f"about {likely}, between {low} and {high}: {stages}"),
        ("", f"{seconds_text(seconds.per_block)} a block and {seconds_text(seconds.fixed)} beside"),
        ("", seconds.basis),
    ]


def methods(some: Iterable[Method]) -> None:
    rows = (
        (one.kind, one.method, one.description, ", ".join(one.formats), ", ".join(one.needs) or "nothing")
        for one in some
    )
    _table(("kind", "method", "what it does", "formats", "needs"), rows)


def files(some: Iterable[File]) -> None:
    rows = ((one.id, one.filename, decimal(one.bytes), one.purpose, f"{one.created_at:%Y-%m-%d %H:%M}") for one in some)
    _table(("file", "name", "size", "purpose", "created (UTC)"), rows)


def event_line(event: Event) -> str:
    return printable(f"{event.created_at:%H:%M:%S}  {event.type:<8}  {event.message}")


def progress_text(one: Job) -> str:
    """Where a job stands, in one line: `running: compressing 34 % (3/8 blocks), about 20 s left`."""
    if one.status != "running":
        return one.status.value
    progress = one.progress
    counted = ""
    if progress.unit == "bytes" and progress.done is not None and progress.total is not None:
        counted = f" ({decimal(progress.done)} of {decimal(progress.total)})"
    elif progress.unit and progress.done is not None:
        counted = f" ({progress.done}/{progress.total} {progress.unit})"
    left = f", about {seconds_text(progress.eta_seconds)} left" if progress.eta_seconds is not None else ""
    stage = one.stage.value if one.stage else "starting"
    return f"running: {stage} {progress.fraction:.0%}{counted}{left}"


def recipe_text(one: Job) -> str:
    return ", then ".join(step_text(step.model_dump(exclude={"ignore"})) for step in one.steps)


def change_text(before: float, after: float) -> str:
    return f"{before:.3f} -> {after:.3f} ({after / before - 1:+.2%})"


def seconds_text(seconds: float) -> str:
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    _print(table)


def _pairs(lines: Iterable[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(printable(name), printable(value))
    _print(table)


def _print(table: Table) -> None:
    out = console()
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as capture:
        out.print(table)
    for line in capture.get().splitlines():  # in a file or a pipe the cells' padding is only in the way
        click.echo(line.rstrip())


def _round_lines(one: Round, methods: list[str]) -> list[tuple[str, str]]:
    told = f"{one.parameters:,} parameters"
    if one.training is not None:
        told += f", held-out loss {change_text(one.training.loss_before, one.training.loss_after)}"
    if one.quality and one.quality.perplexity_before and one.quality.perplexity_after:
        told += f", perplexity {change_text(one.quality.perplexity_before, one.quality.perplexity_after)}"
    return [("after " + ", ".join(methods), told)]


def _slimming_lines(slimming: Slimming) -> list[tuple[str, str]]:
    before, after, target = slimming.speed_before, slimming.speed_after, slimming.speed_target
    asked = [] if target is None else [("", f"{target.asked:g} times as fast was asked for {TASKS[target.speed_of]}")]
    return [
        ("parameters", f"{slimming.parameters_before:,} -> {slimming.parameters_after:,} by {slimming.method}"),
        ("tokens a second", f"{before.prompt:,.0f} -> {after.prompt:,.0f} of a prompt"),
        ("", f"{before.writing:,.1f} -> {after.writing:,.1f} writing"),
        *asked,
        *_trimming_lines(slimming.trimming),
    ]


def _trimming_lines(cut: Trimming | None) -> list[tuple[str, str]]:
    if cut is None:
        return []
    lines = [
        ("vocabulary", f"{cut.rows_before:,} -> {cut.rows_after:,} tokens, of which the text has {cut.found:,}"),
        ("bits a byte", f"{cut.bits_per_byte_before:.3f} -> {cut.bits_per_byte_after:.3f} of the text"),
    ]
    if (other := cut.unseen) is not None:
        lines += [
            ("other text", f"{other.tokens_before:,} -> {other.tokens_after:,} tokens of {other.origin}"),
            ("", f"{other.bits_per_byte_before:.3f} -> {other.bits_per_byte_after:.3f} bits a byte"),
        ]
    return lines


def _factoring_lines(factoring: Factoring) -> list[tuple[str, str]]:
    before, split = factoring.speed_before, factoring.speed_factored
    return [
        ("with factors", f"{factoring.parameters_before:,} -> {factoring.parameters_after:,} parameters"),
        ("", f"{factoring.factored} of {factoring.linears} linears, {decimal(factoring.factor_bytes)} of weights"),
        ("tokens a second", f"{before.prompt:,.0f} -> {split.prompt:,.0f} of a prompt, by factors"),
        ("", f"{before.writing:,.1f} -> {split.writing:,.1f} writing"),
    ]


def _training_lines(one: Training) -> list[tuple[str, str]]:
    return [
        (
            "trained",
            f"{one.trainable_parameters:,} parameters, {one.steps:,} steps, {one.tokens_per_second:,.0f} tokens/s",
        ),
        ("held-out loss", change_text(one.loss_before, one.loss_after)),
        *_accuracy_lines(one),
        *(_domain_line(domain) for domain in one.domains),
        ("learned from", f"{one.data.records:,} records of {one.data.origin}, {one.data.held_out_records:,} held out"),
    ]


def _domain_line(one: Domain) -> tuple[str, str]:
    told = f"held-out loss {change_text(one.loss_before, one.loss_after)}, of the original {one.loss_reference:.3f}"
    shares = f"share {one.weight_before:.1%} -> {one.weight_after:.1%}"
    return f"domain {one.name}", f"{told}; {shares}, {one.drawn:,} sequences drawn of {one.sequences:,}"


def _accuracy_lines(one: Training) -> list[tuple[str, str]]:
    if one.accuracy_before is None or one.accuracy_after is None or one.majority_share is None:
        return []
    told = f"{one.accuracy_before:.1%} -> {one.accuracy_after:.1%}"
    return [("accuracy", f"{told}; always saying the commonest label: {one.majority_share:.1%}")]
