"""What runs in the forked process of one job: pull, compress, upload, tell how it went. Ends with the process."""

import os
import random
import resource
import shutil
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import torch

import workers.warm  # noqa: F401 - for its imports
from models import pipeline
from models.job import Inputs, Named, merging_step
from models.streaming.snapshots import SNAPSHOT_SECONDS
from models.streaming.team import Team
from models.train.checkpoints import adopt
from models.train.division import check_records
from squeeze.errors import ProcessKilled
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.quantization import QAT
from squeeze.steps.training import Train
from storage import Storage, open_storage
from workers.alone import take
from workers.channel import Channel, Message, Teller
from workers.checkpoints import bring
from workers.crew import Crew
from workers.failures import meaning
from workers.processors import count
from workers.pull import Pulled, Wanted, pull
from workers.request import Request
from workers.results import REPORT, upload
from workers.texts import Located, Texts


def run(channel: Channel) -> int:
    """One attempt, from the request that the channel brings; the exit status."""
    return attempt(Request.of(channel.receive()), channel)


def attempt(request: Request, channel: Channel, snapshot_seconds: float = SNAPSHOT_SECONDS) -> int:
    """As `run`, with the request already read."""
    began = time.monotonic()
    _meeting(request).unlink(missing_ok=True)
    crew = Crew(len(request.others), lambda rank, last_word: _share(request, rank, last_word), channel)
    try:
        lock = take(request.scratch_path)
        os.chdir(request.scratch_path)  # what a library writes beside itself is not to lie about where we were started
        manifest = _work(request, Teller(channel), snapshot_seconds)
    except BaseException as error:  # noqa: BLE001 - the edge of the job: whatever it was becomes its error
        if isinstance(error, ProcessKilled):
            crew.blame()
        channel.send(_failure(error, request, began))
        return 1
    channel.send({"done": manifest, "figures": _figures(request, began)})
    lock.close()
    return 0


def _share(request: Request, rank: int, channel: Channel) -> int:
    """What a further process of the job does; the exit status."""
    began = time.monotonic()
    try:
        os.chdir(request.scratch_path)
        spec = request.parsed()
        _settle(spec, request)
        _go_offline()
        pipeline.follow(spec, _team(request, rank))
    except BaseException as error:  # noqa: BLE001 - as in `attempt`
        channel.send(_failure(error, request, began))
        return 1
    return 0


def _team(request: Request, rank: int = 0) -> Team:
    devices = (request.device, *request.others)
    return Team.meeting_at(_meeting(request), rank, len(devices), devices[rank])


def _meeting(request: Request) -> Path:
    return request.scratch_path / f"team-{request.attempt}"


def _work(request: Request, teller: Teller, snapshot_seconds: float) -> dict[str, Any]:
    spec = request.parsed()
    _settle(spec, request)
    storage = open_storage(request.storage_url)
    texts = Texts(request, spec, teller)
    trains = any(isinstance(step, Train) for step in spec.steps)
    fetched = texts.fetch(storage) if trains else None
    if fetched is not None and fetched[0] is not None:  # a line that is wrong is told before any weight is fetched
        _check_examples(spec, fetched[0], fetched[1])
    pulled = pull(request, spec, storage, lambda directory: pipeline.check(spec, directory), teller)
    student = _student(request, spec, storage, teller)
    merged = _merged(request, spec, storage, teller, pulled)
    calibration, evaluation = fetched or texts.fetch(storage)
    work = _made(request.scratch_path / "work")
    if trains or any(isinstance(step, QAT) for step in spec.steps):
        for place, brought in bring(storage, request.job_id, work):
            adopt(place, brought)
    _go_offline()
    outcome = pipeline.run(
        Inputs(
            spec=spec,
            model=pulled.directory,
            model_name=pulled.name,
            revision=pulled.revision,
            license=pulled.license,
            calibration_text=calibration.path if calibration else None,
            evaluation_text=evaluation.path if evaluation else None,
            calibration_origin=calibration.origin if calibration else None,
            evaluation_origin=evaluation.origin if evaluation else None,
            work=work,
            out=_emptied(request.scratch_path / "out"),
            device=request.device,
            consumers={name: Path(python) for name, python in request.consumers.items()},
            merged=merged,
            student=student.directory if student else None,
            student_name=student.name if student else None,
            student_revision=student.revision if student else None,
            digest=pulled.digest,
            student_digest=student.digest if student else None,
            activation_bytes=request.activation_bytes,
            job_id=request.job_id,
            snapshot_seconds=snapshot_seconds,
        ),
        teller,
        _team(request),
    )
    report = request.scratch_path / "out" / REPORT
    return {
        "artifacts": upload(storage, request.prefix, outcome.directories, report, teller),
        "result": outcome.result.model_dump(mode="json"),
        "report": outcome.report.model_dump(mode="json"),
    }


def _student(request: Request, spec: JobSpec, storage: Storage, teller: Teller) -> Pulled | None:
    """The model that learns from the job's own, where the job names one."""
    for param, name in spec.models.items():
        if param.endswith(".student.model"):
            wanted = Wanted(name, param, "student", request.named.get(param, ()))
            return pull(request, spec, storage, lambda path: pipeline.check_student(spec, path), teller, wanted)
    return None


def _merged(request: Request, spec: JobSpec, storage: Storage, teller: Teller, base: Pulled) -> tuple[Named, ...]:
    """What is merged into the job's own model, in the order of the request."""
    step, found = merging_step(spec), []
    for number, entry in enumerate(step.models if step is not None else ()):
        assert step is not None, "it has entries"
        param = f"steps.{spec.steps.index(step)}.models.{number}.model"
        files = request.named.get(param, ())
        wanted = Wanted(entry.name, param, f"merged-{number}", files, adapter=True)
        check = partial(pipeline.check_entry, base.directory, base.name, entry)
        pulled = pull(request, spec, storage, check, teller, wanted)
        found.append(Named(pulled.directory, pulled.name, pulled.revision))
    return tuple(found)


def _check_examples(spec: JobSpec, data: Located, held_out: Located | None) -> None:
    columns = spec.data.column, spec.evaluation.column
    check_records(data.path, held_out.path if held_out else None, columns, spec.label_column, spec.domain_column)


def _settle(spec: JobSpec, request: Request) -> None:
    """The same numbers from the same job, and no more threads than there are processors for us."""
    torch.set_num_threads(max(1, count() // (1 + len(request.others))))
    torch.manual_seed(spec.seed)
    random.seed(spec.seed)
    np.random.seed(spec.seed % 2**32)


def _go_offline() -> None:
    """From here on nothing may come from outside: a library that looks for an optional file would wait for the Hub.

    The token goes too, so that no process that the job starts has it.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        os.environ.pop(name, None)


def _made(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _emptied(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return _made(path)


def _failure(error: BaseException, request: Request, began: float) -> Message:
    failed = meaning(error, request.scratch_path, _peak_host_bytes(), _peak_gpu_bytes(request))
    return {
        "failed": {"code": failed.code, "message": failed.message, "param": failed.param},
        "traceback": "".join(traceback.format_exception(error)),
        "figures": _figures(request, began),
    }


def _figures(request: Request, began: float) -> dict[str, Any]:
    return {
        "peak_host_bytes": _peak_host_bytes(),
        "peak_gpu_bytes": _peak_gpu_bytes(request),
        "gpu_seconds": (time.monotonic() - began) * (1 + len(request.others)) if request.on_gpu else 0.0,
    }


def _peak_host_bytes() -> int:
    """Of this process; what it forked off or started counts apart."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _peak_gpu_bytes(request: Request) -> int:
    return torch.cuda.max_memory_allocated() if request.on_gpu else 0
