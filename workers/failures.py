"""What an exception in a job's process means to its user: a code and advice. Tracebacks are for the log alone."""

import errno
import os
import shutil
import traceback
from pathlib import Path

import torch

from squeeze.errors import CompressionBug, DiskFull, OutOfMemoryGPU, OutOfMemoryHost, SqueezeError

_ROOT = Path(__file__).resolve().parents[1]
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "defaultcpuallocator", "std::bad_alloc")
_NO_GPU_MEMORY = ("cuda out of memory", "cublas_status_alloc_failed", "cuda error: out of memory")


def meaning(error: BaseException, scratch: Path, peak_host_bytes: int, peak_gpu_bytes: int) -> SqueezeError:
    """The error of the tree that an exception, or what caused it, stands for."""
    for link in _chain(error):
        if isinstance(link, SqueezeError):
            return link
        words = str(link).lower()
        if isinstance(link, torch.OutOfMemoryError) or any(sign in words for sign in _NO_GPU_MEMORY):
            return OutOfMemoryGPU(
                f"The GPU ran out of memory; the job had taken {_gib(peak_gpu_bytes)} of it. Take a shorter "
                "`data.sequence_length`, or run it on a worker with a larger GPU or none."
            )
        if (
            isinstance(link, MemoryError)
            or (isinstance(link, OSError) and link.errno == errno.ENOMEM)
            or (isinstance(link, RuntimeError) and any(sign in words for sign in _NO_MEMORY))
        ):
            return OutOfMemoryHost(
                f"The host ran out of memory; the job's process had taken {_gib(peak_host_bytes)}. Take fewer "
                "`data.samples` or a shorter `data.sequence_length`, or give the worker more memory."
            )
        if (isinstance(link, OSError) and link.errno in _FULL) or os.strerror(errno.ENOSPC).lower() in words:
            return _disk_full(link, scratch)
    return CompressionBug(
        f"An unforeseen {type(error).__name__} in {_place(error)}. The worker's log has the details; please report it."
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The exception and its causes, the outermost first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return links


def _disk_full(error: BaseException, scratch: Path) -> DiskFull:
    name = getattr(error, "filename", None)
    where = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else scratch
    # Names from the disk's root down are the operator's business; the last two parts say enough.
    shown = "/".join(where.parts[-2:])
    disk = next((parent for parent in (where, *where.parents) if parent.is_dir()), scratch)
    return DiskFull(
        f"No space is left on the worker's disk while {shown} was written ({_gib(shutil.disk_usage(disk).free)} free). "
        "Free some space or give the worker a larger disk, then retry the job: it goes on from where it stopped."
    )


def _place(error: BaseException) -> str:
    """file:line of the innermost frame, without what lies above the package."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    path = Path(frames[-1].filename)
    if path.is_relative_to(_ROOT):
        shown = str(path.relative_to(_ROOT))
    else:
        shown = path.as_posix().rpartition("site-packages/")[2] if "site-packages" in path.parts else path.name
    return f"{shown}:{frames[-1].lineno}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
