"""The block-streaming engine: one decoder block in memory at a time, calibration and evaluation in the same pass.

For every block: load its weights; run the evaluation windows through it as it is; run the calibration sequences
through it in lock step, each linear compressed before it runs; run the evaluation windows through the compressed
block; write its codes; free it. Peak memory is one block and the activations, whatever the number of blocks. Finished
blocks and, from time to time, the activations are kept on disk, so that another attempt goes on from there.
"""

import fnmatch
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.codes import Codes
from models.data import Windows
from models.frame import Call, Frame
from models.lockstep import run_in_lockstep
from models.progress import Notify
from models.quantize.solution import Solution
from models.quantized import QuantizedModel, Site, block_file, group_columns, tensors_of
from models.resources import peak_gpu_bytes, peak_host_bytes, return_free_memory
from models.statistics import Hessian
from squeeze.errors import NotFinite
from squeeze.objects import Stage
from squeeze.report import Block, Layer
from squeeze.steps import Quantize

TOKENS_PER_BATCH = 4096
SNAPSHOT_SECONDS = 30.0
STREAMS = ("calibration", "original", "compressed")

Method = Callable[[Tensor, Hessian | None, Any, int, torch.dtype], Solution]


@dataclass
class Activations:
    """Hidden states before the next block, as batches (B, T, C) on the host.

    calibration: made by compressed blocks. original, compressed: the evaluation windows through either model.
    """

    calibration: list[Tensor] = field(default_factory=list)
    original: list[Tensor] = field(default_factory=list)
    compressed: list[Tensor] = field(default_factory=list)

    def release(self) -> None:
        """Gives the memory back: what comes after the evaluation, the certifier above all, can use it."""
        for stream in (self.calibration, self.original, self.compressed):
            stream.clear()
        return_free_memory()


@dataclass(frozen=True)
class Quantization:
    """What a pass leaves: the codes on disk, the story of each block, the last hidden states of the windows."""

    model: QuantizedModel
    blocks: list[Block]
    activations: Activations


def method_of(step: Quantize) -> Method:
    """The function of a step, found by its name: `models/<kind>/<method>.py`."""
    return import_module(f"models.{step.kind}.{step.method}").quantize  # type: ignore[no-any-return]


def is_ignored(step: Quantize, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in step.ignore)


def quantize(
    frame: Frame,
    step: Quantize,
    calibration: Tensor | None,
    windows: Windows | None,
    directory: Path,
    fingerprint: str,
    notify: Notify,
    snapshot_seconds: float = SNAPSHOT_SECONDS,
) -> Quantization:
    """Quantizes every block, resuming where an earlier attempt with the same fingerprint stopped.

    calibration: (n, T) int64, for methods that want it. fingerprint: of all that decides the result.
    """
    frame.refuse_misfits()
    kept = _Kept(directory, fingerprint)
    notify.stage(Stage.calibrating)
    calls = _Calls(frame, [ids for ids in (calibration, None if windows is None else windows.ids) if ids is not None])
    start, blocks, activations = kept.resume()
    if start == 0:
        activations = Activations(
            calibration=calls.enter(calibration),
            original=calls.enter(None if windows is None else windows.ids),
        )
        activations.compressed = list(activations.original)
    else:
        notify.event(
            "info", f"going on after block {start} of {frame.count}, which an earlier attempt finished", block=start
        )
    notify.stage(Stage.compressing)
    saved_at = time.monotonic()
    for index in range(start, frame.count):
        block = _Block(frame, step, index, calls)
        blocks.append(block.run(activations, kept.directory))
        return_free_memory()
        notify.advance(index + 1, frame.count, "blocks")
        if index + 1 < frame.count and time.monotonic() - saved_at >= snapshot_seconds:
            kept.snapshot(index + 1, blocks, activations)
            saved_at = time.monotonic()
    if start < frame.count:
        kept.snapshot(frame.count, blocks, activations)
    sites = {site.name: site for n in range(frame.count) for site in frame.sites(n)}
    chosen = {name: site for name, site in sites.items() if not is_ignored(step, name)}
    ignored = tuple(name for name in sites if name not in chosen)
    model = QuantizedModel(kept.directory, step, chosen, ignored, frame.source.dtype)
    return Quantization(model, blocks, activations)


class _Calls:
    """How each block is called for each shape of batch: masks, positions, rotary tables."""

    def __init__(self, frame: Frame, streams: list[Tensor]) -> None:
        self._frame = frame
        self._by_shape: dict[tuple[int, ...], list[Call]] = {}
        # Without streams too: what lies around the blocks is read once, so that damage in it shows.
        with frame.surroundings(), torch.no_grad():
            for ids in streams:
                for batch in {part.shape: part for part in _batches(ids)}.values():
                    self._by_shape[tuple(batch.shape)] = frame.enter(batch)[1]

    def enter(self, ids: Tensor | None) -> list[Tensor]:
        """The first block's hidden states for every batch of ids, on the host."""
        if ids is None:
            return []
        with self._frame.surroundings(), torch.no_grad():
            return [self._frame.enter(batch)[0].cpu() for batch in _batches(ids)]

    def of(self, index: int, hidden: Tensor) -> Call:
        return self._by_shape[tuple(hidden.shape[:2])][index]


def _batches(ids: Tensor) -> tuple[Tensor, ...]:
    return torch.split(ids, max(1, TOKENS_PER_BATCH // ids.shape[1]))


class _Block:
    """The work on one block."""

    def __init__(self, frame: Frame, step: Quantize, index: int, calls: _Calls) -> None:
        self.frame, self.step, self.index, self.calls = frame, step, index, calls
        self.method = method_of(step)
        self.sites = {site.name: site for site in frame.sites(index) if not is_ignored(step, site.name)}
        self.codes: dict[str, Codes] = {}
        self.layers: list[Layer] = []
        self._inputs: list[Tensor] = []
        self._statistics: Hessian | None = None

    def run(self, activations: Activations, directory: Path) -> Block:
        """Compresses the block, moves the activations behind it, writes its codes."""
        began = time.monotonic()
        with self.frame.block(self.index) as module, torch.no_grad():
            activations.original = self._forward(module, activations.original)
            if activations.calibration:
                batches = [(self._here(x), *self.calls.of(self.index, x)) for x in activations.calibration]
                linears = {name: self.frame.module(site) for name, site in self.sites.items()}
                activations.calibration = [x.cpu() for x in run_in_lockstep(module, batches, linears, self._arrive)]
                self._inputs, self._statistics = [], None
            else:
                for name in self.sites:
                    self._compress(name, None)
            activations.compressed = self._forward(module, activations.compressed)
        self._check_finite(activations)
        path = block_file(directory, self.index)
        save_file(dict(tensors_of({name: self.codes[name].cpu() for name in self.codes})), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        return Block(
            index=self.index,
            seconds=time.monotonic() - began,
            peak_host_bytes=peak_host_bytes(),
            peak_gpu_bytes=peak_gpu_bytes(),
            relative_error=_relative_error(activations),
            layers=self.layers,
        )

    def _here(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.frame.device)

    def _forward(self, module: nn.Module, batches: list[Tensor]) -> list[Tensor]:
        done = []
        for hidden in batches:
            args, kwargs = self.calls.of(self.index, hidden)
            output = module(self._here(hidden), *args, **kwargs)
            done.append((output[0] if isinstance(output, tuple) else output).cpu())
        return done

    def _arrive(self, name: str, inputs: list[Tensor]) -> None:
        """All calibration inputs of a linear are here. One that reads what the last one read shares its statistics."""
        if self._statistics is None or any(a is not b for a, b in zip(inputs, self._inputs, strict=True)):
            self._inputs = inputs
            self._statistics = Hessian(inputs[0].shape[-1], self.frame.device)
            for batch in inputs:
                self._statistics.add(batch)
        self._compress(name, self._statistics)

    def _compress(self, name: str, statistics: Hessian | None) -> None:
        site = self.sites[name]
        weight = cast(Tensor, self.frame.module(site).weight)
        W = (weight.T if site.transposed else weight).to(torch.float32, copy=True).contiguous()  # (out, in)
        group_size = group_columns(self.step, site)
        solution = self.method(W, statistics, self.step, group_size, self.frame.source.dtype)
        result = solution.codes.dequantize(self.frame.dtype)
        weight.copy_(result.T if site.transposed else result)
        self.codes[name] = solution.codes
        self.layers.append(_layer(site, solution, result.float() - W, W, statistics, group_size))

    def _check_finite(self, activations: Activations) -> None:
        for stream in STREAMS:
            for hidden in getattr(activations, stream):
                if not torch.isfinite(hidden).all():
                    raise NotFinite(
                        f"decoder block {self.index} gives NaN or infinity on the {stream} pass in {self.frame.dtype}; "
                        "the model is damaged, or its activations do not fit that type"
                    )


def _layer(
    site: Site, solution: Solution, difference: Tensor, W: Tensor, statistics: Hessian | None, group_size: int
) -> Layer:
    if statistics is None:
        error = float(difference.square().sum() / W.square().sum().clamp_min(1e-30))
    else:
        error = statistics.error_of(difference, W)
    return Layer(
        name=site.name,
        bits=solution.codes.bits,
        group_size=group_size,
        relative_error=error,
        damping=solution.damping,
        damping_escalations=solution.escalations,
    )


def _relative_error(activations: Activations) -> float | None:
    if not activations.original:
        return None
    changed = whole = 0.0
    for before, after in zip(activations.original, activations.compressed, strict=True):
        changed += float((after.float() - before.float()).square().sum(dtype=torch.float64))
        whole += float(before.float().square().sum(dtype=torch.float64))
    return changed / whole if whole else 0.0


class _Kept:
    """What is kept in the work directory: codes of finished blocks, and the latest snapshot of the activations."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.directory = directory
        mark = directory / "fingerprint"
        if directory.exists() and (not mark.is_file() or mark.read_text() != fingerprint):
            shutil.rmtree(directory)  # another recipe's leavings
        directory.mkdir(parents=True, exist_ok=True)
        mark.write_text(fingerprint)

    def snapshot(self, done: int, blocks: list[Block], activations: Activations) -> None:
        """After `done` blocks. The new one is complete before the old one goes."""
        tensors = {
            f"{stream}.{n}": hidden for stream in STREAMS for n, hidden in enumerate(getattr(activations, stream))
        }
        target = self.directory / f"snapshot-{done:05d}"
        part = self.directory / "snapshot.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_file({name: hidden.contiguous() for name, hidden in tensors.items()}, part / "activations.safetensors")
        (part / "blocks.json").write_text(json.dumps([block.model_dump() for block in blocks]))
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in self.directory.glob("snapshot-*"):
            if old != target:
                shutil.rmtree(old)

    def resume(self) -> tuple[int, list[Block], Activations]:
        """(blocks done, their stories, activations after them) of the latest snapshot; zero where there is none."""
        snapshots = sorted(self.directory.glob("snapshot-*"))
        if not snapshots:
            return 0, [], Activations()
        latest = snapshots[-1]
        blocks = [Block.model_validate(one) for one in json.loads((latest / "blocks.json").read_text())]
        tensors = load_file(latest / "activations.safetensors")
        activations = Activations(
            **{
                stream: [
                    tensors[f"{stream}.{n}"] for n in range(sum(name.startswith(f"{stream}.") for name in tensors))
                ]
                for stream in STREAMS
            }
        )
        return len(blocks), blocks, activations
