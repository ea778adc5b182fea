"""Jobs as the tests of this room make them."""

from datetime import timedelta
from typing import Any

from sqlalchemy.orm import Session

from jobs import lifecycle
from jobs.records import JobRecord
from squeeze.errors import NotFinite
from squeeze.objects import Result, Status, Usage
from squeeze.specs.job_spec import JobSpec

MODEL = "HuggingFaceTB/SmolLM2-135M"
LEASE_SECONDS = 30.0
RESULT = Result(source_bytes=1000, result_bytes={"gptq": 300}, compression_ratio=3.3, bits_per_weight=4.2)
USAGE = Usage(cpu_seconds=2.0, peak_host_bytes=100)
REPORT = {"schema_version": 1, "blocks": []}
ARTIFACT = lifecycle.NewArtifact("gptq/model.safetensors", 300, "00" * 32, "gptq", "jobs/x/1/gptq/model.safetensors")


def spec(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({"model": MODEL, "steps": [{"kind": "quantize", "method": "rtn"}]} | fields)


def submit(session: Session, *, project: str = "default", **fields: Any) -> JobRecord:
    record, created = lifecycle.submit(
        session, project=project, spec=spec(**fields), idempotency_key=None, body_hash="-"
    )
    assert created
    return record


def claim(session: Session, job_id: str, worker: str = "worker") -> lifecycle.Claim:
    claimed = lifecycle.claim(session, job_id, worker=worker, lease_seconds=LEASE_SECONDS)
    assert claimed is not None
    return claimed


def publish(session: Session, job_id: str, attempt: int, *artifacts: lifecycle.NewArtifact) -> bool:
    return lifecycle.publish(session, job_id, attempt, artifacts=artifacts, result=RESULT, report=REPORT, usage=USAGE)


def expire(session: Session, record: JobRecord) -> None:
    """Makes the lease of a job one that ran out long ago."""
    assert record.lease_expires_at is not None
    record.lease_expires_at -= timedelta(days=1)
    session.flush()


def bring(session: Session, status: Status, *, project: str = "default", **fields: Any) -> JobRecord:
    """A job in a status, brought there by legal moves alone."""
    record = submit(session, project=project, **fields)
    if status == Status.queued:
        return record
    attempt = claim(session, record.id).attempt
    if status in (Status.cancelling, Status.cancelled):
        lifecycle.cancel(session, project, record.id)
    if status == Status.cancelled:
        lifecycle.cancelled(session, record.id, attempt)
    elif status == Status.succeeded:
        publish(session, record.id, attempt)
    elif status == Status.failed:
        lifecycle.fail(session, record.id, attempt, NotFinite("NaN in layer 3"), USAGE)
    assert record.status == status
    return record
