"""Where in the storage what belongs to a job lies. All of it goes with the job."""


def job_prefix(job_id: str) -> str:
    return f"jobs/{job_id}"


def attempt_prefix(job_id: str, attempt: int) -> str:
    """Where one attempt, and no other, writes its results."""
    return f"{job_prefix(job_id)}/{attempt}"


def checkpoints_prefix(job_id: str) -> str:
    """What its trainings go on from, should their machine be lost. No artifact lies there, and none is read from it."""
    return f"{job_prefix(job_id)}/checkpoints"


def attempt_of(key: str) -> int | None:
    """Whose result it is; None where it is none."""
    number = key.split("/")[2]
    return int(number) if number.isdecimal() else None
