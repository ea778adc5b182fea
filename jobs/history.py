"""What finished jobs took: the speeds that plans and estimates of the time left rest on."""

from typing import Any

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from jobs.records import JobRecord, StepRecord
from squeeze.costs.pace import Past
from squeeze.objects import Status

LATEST = 50  # jobs that are looked at


def finished(session: Session, method: str, *, gpu: bool | None = None) -> list[Past]:
    """What the latest jobs of a method took, the newest first; where there are none, the latest of all methods.

    Of all projects: nothing of a job is told but its method, its device and its speed. gpu: only those of GPUs, or of
    CPUs; None: all. Jobs that went on from an earlier attempt are left out, since their reports know half of the time.
    """
    mine = exists().where(StepRecord.job_id == JobRecord.id, StepRecord.method == method)
    for of_method in ([mine], []):
        query = (
            select(JobRecord.report["device"], JobRecord.report["spent"], JobRecord.report["recipe"])
            .where(JobRecord.status == Status.succeeded, JobRecord.attempt == 1, *of_method)
            .order_by(JobRecord.id.desc())
            .limit(LATEST)
        )
        found = [past for row in session.execute(query) if (past := _past(*row)) is not None]
        found = [past for past in found if gpu is None or gpu != past.device.casefold().startswith("cpu")]
        if found:
            return found
    return []


def _past(device: Any, spent: Any, recipe: Any) -> Past | None:
    """None where the report is of a version that counted no work."""
    if not isinstance(device, str) or not isinstance(spent, dict) or not spent.get("work"):
        return None
    return Past(str(recipe[-1]["method"]), device, spent["seconds"], spent["work"])
