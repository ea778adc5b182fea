"""What this process uses: memory and processor time, and how its heap gives memory back."""

import ctypes
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass
class Clock:
    """Wall seconds by stage; one that comes twice counts twice, and one within another is no part of that."""

    seconds: dict[str, float] = field(default_factory=dict)
    _within: float = field(default=0.0, init=False)  # of stages within the present one

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began, (outer, self._within) = time.monotonic(), (self._within, 0.0)
        yield
        taken = time.monotonic() - began
        self.seconds[name] = round(self.seconds.get(name, 0.0) + taken - self._within, 3)
        self._within = outer + taken


def peak_host_bytes() -> int:
    """The largest resident size of this process so far; `ru_maxrss` would count the one that it was started from."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_gpu_bytes() -> int:
    """The most that torch had allocated on the GPU so far; 0 where none was used."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def cpu_seconds() -> float:
    """Of this process and its ended children, user and system."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def return_free_memory() -> None:
    """Hands freed heap pages back to the system, so that fragments don't pile up from block to block.

    Without it a job of 64 blocks of width 512 peaked 40 % above one of 8 blocks, all of it freed memory. glibc only;
    other allocators have no need of it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def map_large_memory() -> None:
    """Has what is freed of 1 MiB and more go back to the system at once, from now on in this process.

    glibc moves the bound up to 32 MiB as large pieces are freed, and keeps those below it. Loading a model of 210 M
    parameters in nf4 took between 260 and 1,100 MB for 140 MB of codes; with a fixed bound 190. Until glibc 2.38 what
    is kept has a hole for every aligned piece that was freed, into which the next one of its size doesn't fit: a
    training with checkpointed activations took five times what it held. Getting each piece from the system costs time,
    the more the narrower the model: of a training's forward and backward pass 40 % at a width of 512.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def available_host_bytes() -> int:
    """Memory that this process could still take: the machine's, or its container's where that has a lower limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)


def available_device_bytes(device: torch.device) -> int:
    """Memory that is free where the work is done."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_host_bytes()


def device_name(device: torch.device, processes: int = 1) -> str:
    """For people. processes: that share the work, on a device like it each."""
    each = "" if processes == 1 else f"{processes} × "
    if device.type == "cuda":
        return each + torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{each}CPU, {threads} thread{'' if threads == 1 else 's'}"
