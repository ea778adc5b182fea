"""Whether the disk has room for a job, asked before anything large is fetched."""

import shutil
from pathlib import Path

from squeeze.errors import DiskFull
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.factoring import SVD
from squeeze.steps.merging import Merge
from squeeze.steps.slimming import Slim
from squeeze.steps.sparsifying import Sparsify
from squeeze.steps.training import Train

_CODES_SHARE = 0.55  # of 16-bit weights: what the engine keeps between attempts, a byte a weight and scales
_SKETCH_SHARE = 0.2  # of the weights: sums of gradients, 2 KB for each output of a linear of some thousand inputs
_SOURCE_BITS = 16
_OVERHEAD_SHARE = 0.1  # scales, embeddings and other tensors that stay as they are


def demand(
    spec: JobSpec, *, source_bytes: int, missing_bytes: int, cache: Path, scratch: Path, storage: Path | None
) -> None:
    """Raises DiskFull, with figures, where source and result would not fit.

    source_bytes: of the model's weights. missing_bytes: what of them is still to be fetched into the cache. storage:
    a directory on the disk of the object storage, where that is a local one.
    """
    needs: list[tuple[str, Path, int]] = [
        ("model", cache, missing_bytes),
        ("result", scratch, max(0, _made_bytes(spec, source_bytes) - _held_bytes(scratch))),
    ]
    if storage is not None:
        needs.append(("copy in the storage", storage, _written_bytes(spec, source_bytes)))
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for need in needs:
        disks.setdefault(need[1].stat().st_dev, []).append(need)
    for disk in disks.values():
        free = shutil.disk_usage(disk[0][1]).free
        wanted = sum(size for _, _, size in disk)
        if wanted > free:
            what = ", ".join(f"{name} {_gib(size)}" for name, _, size in disk)
            raise DiskFull(
                f"the worker's disk at {disk[0][1].name}/ has {_gib(free)} free and the job needs about {_gib(wanted)} "
                f"({what}). Free some space or give the worker a larger disk, then retry the job."
            )


def _written_bytes(spec: JobSpec, source_bytes: int) -> int:
    bits = min((step.scheme().bits for step in spec.compressing[-1:]), default=_SOURCE_BITS)
    return int(len(spec.formats) * source_bytes * min(1.0, bits / _SOURCE_BITS + _OVERHEAD_SHARE))


def _made_bytes(spec: JobSpec, source_bytes: int) -> int:
    goes_on = sum(isinstance(step, Merge | Slim | Train) for step in spec.steps[:-1])  # what it made, to the next step
    # Kept as they are, and whole for a next step.
    plain = [step for step in spec.steps if isinstance(step, Sparsify | SVD)]
    kept = sum(source_bytes * (1 if step is spec.steps[-1] else 2) for step in plain) + source_bytes * goes_on
    kept += sum(int(source_bytes * _SKETCH_SHARE) for step in spec.steps if isinstance(step, SVD) and step.gradients)
    return int(source_bytes * _CODES_SHARE) + kept + _written_bytes(spec, source_bytes)


def _held_bytes(scratch: Path) -> int:
    """What an earlier attempt left, which is used again or overwritten."""
    return sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file() and not file.is_symlink())


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
