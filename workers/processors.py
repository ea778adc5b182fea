"""How many processors this process may use, and whether there is a GPU. Importable without torch."""

import math
import os
import subprocess
import sys
from pathlib import Path

from squeeze.errors import SpecInvalid

_CGROUPS = Path("/sys/fs/cgroup")


def count() -> int:
    """Threads for torch: `OMP_NUM_THREADS` where it is set, else the processors that affinity and quota leave us.

    torch counts the machine's, so that in a container with a quota of 4 on a machine of 64 it would run 64 threads.
    """
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    quota = _quota()
    available = len(os.sched_getaffinity(0))
    return available if quota is None else max(1, min(available, math.floor(quota)))


def resolve_device(asked: str) -> str:
    """`auto` becomes `cuda:0` where torch sees a GPU, else `cpu`; a device that is named stays."""
    if asked != "auto":
        return asked
    if not Path("/dev/nvidiactl").exists():
        return "cpu"
    # In a process of its own: this one must never import torch, let alone touch the GPU.
    looks = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return "cuda:0" if subprocess.run([sys.executable, "-c", looks], check=False).returncode == 0 else "cpu"


def devices_of(device: str, gpus: int) -> tuple[str, ...]:
    """The devices of each process of a job on a worker's device, which may be several GPUs (`cuda:0,1`).

    gpus: as the job's limits have it. A worker on the CPU runs so many processes there. Raises SpecInvalid where the
    worker has fewer GPUs.
    """
    wanted = max(1, gpus)
    if device == "cpu":
        return ("cpu",) * wanted
    held = tuple(f"cuda:{number}" for number in device.removeprefix("cuda:").split(","))
    if wanted > len(held):
        raise SpecInvalid(
            f"limits.gpus is {wanted}, and the worker has {len(held)}: ask for that many, or have the operator start a "
            f"worker on {wanted} (SQUEEZE_DEVICE=cuda:0,1 and so on)",
            param="limits.gpus",
        )
    return held[:wanted]


def _quota() -> float | None:
    """Processors that the control group allows, as a fraction; None where it sets no bound."""
    try:
        quota, period = (_CGROUPS / "cpu.max").read_text().split()  # version 2
    except FileNotFoundError:
        try:
            quota = (_CGROUPS / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (_CGROUPS / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except FileNotFoundError:
            return None
    if quota in ("max", "-1"):
        return None
    return int(quota) / int(period)
