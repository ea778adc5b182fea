"""How every job ends, whatever its steps: its results certified one by one, what it took, cards and report written."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from models.card import write_card
from models.files.checkpoint import SourceModel
from models.files.disk import write_whole
from models.formats.directory import linked
from models.job import Inputs, Outcome, result_of, source_part
from models.progress import Notify
from models.resources import Clock, cpu_seconds, peak_gpu_bytes, peak_host_bytes
from models.work import summed
from squeeze.names import Format
from squeeze.objects import Stage
from squeeze.reports.report import Certificate, Report, Spent


def linked_out(inputs: Inputs, whole: Path, clock: Clock, notify: Notify) -> dict[Format, Path]:
    """A whole model's directory as the results of a job that ends with it, no byte of it copied."""
    places: dict[Format, Path] = {name: inputs.out / name for name in inputs.spec.formats}
    with clock.stage("exporting"):
        notify.stage(Stage.exporting)
        for directory in places.values():
            linked(whole, directory)
    return places


def certified(
    inputs: Inputs,
    directories: Mapping[Format, Path],
    certify: Callable[[Format, Path], list[Certificate]],
    clock: Clock,
    notify: Notify,
) -> list[Certificate]:
    """What consumers say of each result; nothing of what only the next round will read. certify: of one."""
    certificates: list[Certificate] = []
    if inputs.goes_on:
        return certificates
    with clock.stage("certifying"):
        notify.stage(Stage.certifying)
        for number, (name, directory) in enumerate(directories.items(), start=1):
            certificates += certify(name, directory)
            notify.advance(number, len(directories), "formats")
    return certificates


def spent(
    clock: Clock, work: dict[str, float], certificates: list[Certificate], *, gpu_seconds: float, earlier_bytes: int = 0
) -> Spent:
    """What the job took. work: operations by stage. gpu_seconds: of all processes. earlier_bytes: the peak of host
    memory in attempts before this one.
    """
    return Spent(
        seconds=clock.seconds,
        work=work,
        cpu_seconds=round(cpu_seconds(), 3),
        gpu_seconds=round(gpu_seconds, 3),
        peak_host_bytes=max(peak_host_bytes(), earlier_bytes),
        peak_gpu_bytes=peak_gpu_bytes(),
        certifier_peak_host_bytes=max((one.peak_host_bytes or 0 for one in certificates), default=0) or None,
    )


def with_before(
    report: Report,
    inputs: Inputs,
    source: SourceModel,
    work: Mapping[str, float],
    warnings: Sequence[str],
    **parts: object,
) -> Report:
    """The report of what came after a step, with what is told of that, and as of a job that began with its model.

    source: that model. work: operations of the step, by stage. warnings: of the step, which come first. parts: fields
    of the report.
    """
    whole = source.weight_bytes
    sizes = [
        size if size.ratio is None else size.model_copy(update={"ratio": whole / size.weight_bytes})
        for size in report.sizes
    ]
    told = {
        "sizes": sizes,
        "source": source_part(inputs, source),
        "warnings": [*dict.fromkeys([*warnings, *report.warnings])],
        "spent": report.spent.model_copy(update={"work": summed(dict(work), report.spent.work)}),
    }
    return report.model_copy(update=told | parts)


def closed(inputs: Inputs, directories: dict[Format, Path], report: Report) -> Outcome:
    """Writes the report, and a card beside each result."""
    for name, directory in directories.items():
        write_card(directory, name, report)
    write_whole(inputs.out / "report.json", report.model_dump_json(indent=2) + "\n")
    return Outcome(directories, report, result_of(report, directories))
