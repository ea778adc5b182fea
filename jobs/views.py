"""Records as the wire shows them."""

from urllib.parse import quote

from jobs.records import ArtifactRecord, EventRecord, FileRecord, JobRecord
from squeeze.objects import Artifact, Event, File, Job, Progress


def job(record: JobRecord) -> Job:
    progress = Progress(
        fraction=record.fraction,
        done=record.done,
        total=record.total,
        unit=record.unit,
        eta_seconds=record.eta_seconds,
    )
    return Job.model_validate(
        {
            **record.spec,
            "id": record.id,
            "status": record.status,
            "stage": record.stage,
            "progress": progress,
            "attempt": record.attempt,
            "created_at": record.created_at,
            "started_at": record.started_at,
            "finished_at": record.finished_at,
            "model_revision": record.model_revision,
            "error": record.error,
            "result": record.result,
            "usage": record.usage,
        }
    )


def event(record: EventRecord) -> Event:
    return Event(
        id=record.id,
        job_id=record.job_id,
        attempt=record.attempt,
        created_at=record.created_at,
        type=record.type,
        message=record.message,
        data=record.data,
    )


def artifact(record: ArtifactRecord) -> Artifact:
    return Artifact(
        filename=record.filename,
        bytes=record.bytes,
        sha256=record.sha256,
        format=record.format,
        download_url=f"/v1/jobs/{record.job_id}/artifacts/{quote(record.filename)}",
    )


def file(record: FileRecord) -> File:
    return File.model_validate(
        {
            "id": record.id,
            "filename": record.filename,
            "bytes": record.bytes,
            "sha256": record.sha256,
            "purpose": record.purpose,
            "created_at": record.created_at,
        }
    )
