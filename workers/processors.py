"""How many processors this process may use, and whether there is a GPU. Importable without torch."""

import math
import os
import subprocess
import sys
from pathlib import Path

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
