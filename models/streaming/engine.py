"""The block-streaming engine: one decoder block in memory at a time, calibration and evaluation in the same pass.

For every block: load its weights; run the evaluation windows through it as it is; run the calibration sequences
through it in lock step, each linear compressed before it runs; run the evaluation windows through the compressed
block; write its codes; free it. Peak memory is one block and the activations, whatever the number of blocks. Finished
blocks and, from time to time, the activations are kept on disk, so that another attempt goes on from there.

Several processes may share the calibration set and the windows (`models.streaming.team`): each sends its share of the
batches through every block, and where a linear is compressed they add up what they saw.
"""

import fnmatch
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.progress import Notify
from models.resources import available_host_bytes, return_free_memory
from models.streaming.block import BlockJob
from models.streaming.calls import Calls
from models.streaming.frame import Frame
from models.streaming.snapshots import SNAPSHOT_SECONDS, SNAPSHOT_SHARE, Activations, Snapshots
from models.streaming.streams import Room, Stream
from models.streaming.team import SOLO, Team
from models.texts.data import Windows
from models.weights.quantized import QuantizedModel
from squeeze.errors import DataUnusable, SpecInvalid
from squeeze.objects import Stage
from squeeze.reports.report import Block
from squeeze.steps.compressing import Compress
from squeeze.steps.schemes import Scheme


@dataclass(frozen=True)
class Quantization:
    """What a pass leaves: the codes on disk, the story of each block, the last hidden states of the windows."""

    model: QuantizedModel
    blocks: list[Block]
    activations: Activations


def is_ignored(step: Compress, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in step.ignore)


def idle_patterns(step: Compress, frame: Frame) -> list[str]:
    """Warnings of `ignore` patterns that no layer's name matches."""
    names = [site.name for n in range(frame.count) for site in frame.sites(n)]
    names += [name for name, module in frame.model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    return [
        f"the `ignore` pattern {pattern!r} matches no layer; their names are like {names[0]}"
        for pattern in step.ignore
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names)
    ]


def schemes_of(frame: Frame, step: Compress) -> dict[str, Scheme]:
    """How every linear that the step doesn't ignore will be stored, in the model's order."""
    sites = [site for n in range(frame.count) for site in frame.sites(n) if not is_ignored(step, site.name)]
    method = import_module(f"models.{step.kind}.{step.method}")
    if hasattr(method, "schemes"):
        return cast(dict[str, Scheme], method.schemes(frame.source, sites, step))
    scheme = step.scheme()
    if scheme.element == "dense" and frame.source.entries:  # of the type of the weights, once they are there
        scheme = replace(scheme, bits=8 * frame.source.dtype.itemsize)
    return {site.name: scheme for site in sites}


def quantize(
    frame: Frame,
    step: Compress,
    calibration: Tensor | None,
    windows: Windows | None,
    directory: Path,
    fingerprint: str,
    notify: Notify,
    snapshot_seconds: float = SNAPSHOT_SECONDS,
    *,
    schemes: Mapping[str, Scheme] | None = None,
    reference: Frame | None = None,
    memory_bytes: int | None = None,
    team: Team = SOLO,
    method: Any = None,
) -> Quantization:
    """Quantizes every block, resuming where an earlier attempt with the same fingerprint stopped.

    calibration: (n, T) int64, for methods that want it. fingerprint: of all that decides the result.
    schemes: of every linear that is to be compressed; None: the step's own for all.
    reference: the model that the result is compared with; None: the one that is compressed.
    memory_bytes: what activations may take on the host between two blocks, and on the device within one; the rest goes
    to disk, or is computed again. None: half of what is free. The result is the same.
    team: of which every process calls this, with the same arguments but for the frames' device and `notify`. All that
    is written is the leader's, and what it returns is whole; the others return their share of the activations. The
    result is that of one process, to the bit, as long as there is a whole batch for each and the calibration inputs of
    a block fit in memory; where they don't, statistics are summed in another order, in float32.
    method: what finds the codes; None: the step's own module.
    """
    _refuse_unsharable(step, calibration, team)
    schemes = dict(schemes_of(frame, step) if schemes is None else schemes)
    reference = reference or frame
    frame.refuse_misfits()
    kept = Snapshots(directory, fingerprint, team)
    room_bytes = available_host_bytes() // 2 if memory_bytes is None else memory_bytes
    room = Room(room_bytes // team.size, kept.own / "activations")
    notify.stage(Stage.calibrating)
    window_ids = None if windows is None else windows.ids
    ids = [one for one in (calibration, window_ids) if one is not None]
    calls = Calls(frame, ids, team)
    reference_calls = calls if reference is frame else Calls(reference, ids, team)
    blocks, activations = kept.resume(room) or (
        [],
        _entered(step, calls, reference_calls, calibration, window_ids, room),
    )
    _tell(notify, len(blocks), frame.count, room)
    start = len(blocks)
    notify.stage(Stage.compressing)
    saved_at, cost = time.monotonic(), 0.0
    for index in range(start, frame.count):
        if reference is not frame:
            with reference.block(index) as module, torch.no_grad():
                reference_calls.forward(index, module, activations.original)
        job = BlockJob(
            frame,
            step,
            schemes,
            index,
            calls,
            compares=reference is frame,
            memory_bytes=memory_bytes,
            team=team,
            method=method,
        )
        blocks.append(job.run(activations, kept.directory))
        del job
        return_free_memory()
        notify.advance(index + 1, frame.count, "blocks")
        now = time.monotonic()
        # After every block, unless that would cost more than a tenth of the time: then less often.
        if team.tell(index + 1 < frame.count and now - saved_at >= min(snapshot_seconds, cost / SNAPSHOT_SHARE)):
            kept.save(index + 1, blocks, activations)
            saved_at, cost = time.monotonic(), time.monotonic() - now
    if start < frame.count:
        kept.save(frame.count, blocks, activations)
    for name in ("original", "compressed"):
        setattr(activations, name, _whole(getattr(activations, name), room, team))
    return Quantization(_written(frame, step, schemes, kept.directory), blocks, activations)


def _entered(
    step: Compress,
    calls: Calls,
    reference_calls: Calls,
    calibration: Tensor | None,
    window_ids: Tensor | None,
    room: Room,
) -> Activations:
    """Before the first block."""
    return Activations(
        Stream(room, calls.enter(calibration)),
        Stream(room, reference_calls.enter(window_ids)),
        Stream(room, calls.enter(window_ids)),
        Stream(room, calls.enter(calibration if step.by_block or "drift" in step.wanted() else None)),
    )


def _tell(notify: Notify, finished: int, count: int, room: Room) -> None:
    """Where it goes on, and what is kept where. finished: of so many blocks."""
    if finished:
        notify.event(
            "info", f"going on after block {finished} of {count}, which an earlier attempt finished", block=finished
        )
    if room.spills:
        notify.event("info", f"activations past {room.limit_bytes:,} bytes are kept on disk")


def _written(frame: Frame, step: Compress, schemes: dict[str, Scheme], directory: Path) -> QuantizedModel:
    """The codes that all blocks left in a directory."""
    sites = {site.name: site for n in range(frame.count) for site in frame.sites(n)}
    chosen = {name: site for name, site in sites.items() if name in schemes}
    ignored = tuple(name for name in sites if name not in chosen)
    return QuantizedModel(directory, step, chosen, schemes, ignored, frame.source.dtype)


def _refuse_unsharable(step: Compress, calibration: Tensor | None, team: Team) -> None:
    if team.size == 1:
        return
    if step.by_block:
        raise SpecInvalid(
            f"{step.method} works on whole blocks, which several GPUs can't share; set limits.gpus to 1",
            param="limits.gpus",
        )
    if calibration is not None and len(calibration) < team.size:
        raise DataUnusable(
            f"{len(calibration)} calibration sequences can't be shared by {team.size} GPUs; give more data.samples, or "
            "fewer limits.gpus",
            param="limits.gpus",
        )


def _whole(share: Stream, room: Room, team: Team) -> Stream:
    """On the leader, the batches that all processes have of a stream, in order; on the others, what they had."""
    if team.size == 1:
        return share
    together = Stream(room) if team.leads else share
    lengths = team.gather(len(share))
    for owner in reversed(range(team.size)):  # in which order batches are dealt out
        for number in range(lengths[owner]):
            batch = team.tensors({"": share[number]} if team.rank == owner else {}, owner)[""]
            if team.leads:
                together.append(batch)
    if team.leads:
        share.clear()
    return together
