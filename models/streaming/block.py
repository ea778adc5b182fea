"""The work on one decoder block: its linears are compressed, the streams of hidden states move behind it."""

import copy
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.formats.fitness import computed_as_one
from models.quantize import kv_cache
from models.quantize.problem import Problem, Solution, pruned
from models.resources import available_device_bytes, peak_gpu_bytes, peak_host_bytes, return_free_memory
from models.streaming.activations import rounding_inputs, static_scale
from models.streaming.calls import Batches, Calls, held_bytes, run
from models.streaming.frame import Frame
from models.streaming.lockstep import Twin, run_in_lockstep
from models.streaming.passes import gathered, run_in_passes
from models.streaming.snapshots import STREAMS, Activations
from models.streaming.statistics import Statistics
from models.streaming.streams import Stream
from models.streaming.team import SOLO, Team
from models.streaming.wiring import Producer, Wiring, scale_outputs, wiring_of
from models.weights.codes import Encoded
from models.weights.finite import all_finite
from models.weights.quantized import Site, block_file, tensors_of
from squeeze.errors import NotFinite
from squeeze.reports.report import Block, Layer
from squeeze.steps.compressing import Compress
from squeeze.steps.schemes import Scheme

LOCKSTEP_SHARE = 0.5  # of the free memory; what a block needs beside is its weights, Hessians and copies


def method_of(step: Compress) -> Any:
    """The module of a step's method, found by its name: `models/<kind>/<method>.py`.

    It has a function of its kind's name, `quantize(problem, step) -> Solution`, called for the linears that read one
    input, or, where the step is `by_block`, `quantize_block(work, step)`, which gives a Solution by name. It may have
    `fold(problem, step)`, which gives a scale for each input column, (in,) float32, or None: the weights' columns are
    multiplied by it and whatever makes the inputs is divided, before anything is rounded.
    """
    return import_module(f"models.{step.kind}.{step.method}")


@dataclass(frozen=True)
class BlockWork:
    """What a method that works on whole blocks is given.

    module: the block, its weights loaded and free to change. linears: the modules to compress by name, with their
    sites and schemes. batches: hidden states (B, T, C) and the other arguments of the block's call, for every batch of
    the calibration set, read when asked for, as the compressed blocks before made them. targets: what the block puts
    out in the uncompressed model, batch by batch. dtype: of the model, which bounds what scales can be stored.
    """

    module: nn.Module
    linears: Mapping[str, nn.Module]
    sites: Mapping[str, Site]
    schemes: Mapping[str, Scheme]
    batches: Batches
    targets: Stream
    dtype: torch.dtype

    def weight(self, name: str) -> Tensor:
        """A copy of a linear's weight, (out, in) float32."""
        return _weight(self.linears[name], self.sites[name])


class BlockJob:
    """One block, compressed once.

    schemes: of every linear to compress, in the model's order. memory_bytes: what the calibration inputs of all batches
    may take at once; None: half of what is free. compares: the evaluation windows' original stream runs through this
    block too. method: what finds the codes; None: the step's own module.

    team: the processes that have a share of the calibration set and of the windows each. Statistics are summed over
    all; then the leader alone compresses, and hands the weights out: so all go on with the same, to the bit, which each
    of them rounding for itself would not promise. Codes and what is told of the layers are the leader's.
    """

    def __init__(
        self,
        frame: Frame,
        step: Compress,
        schemes: Mapping[str, Scheme],
        index: int,
        calls: Calls,
        *,
        compares: bool,
        memory_bytes: int | None = None,
        team: Team = SOLO,
        method: Any = None,
    ) -> None:
        self.team = team
        self.frame, self.step, self.index, self.calls, self.compares = frame, step, index, calls, compares
        self.memory_bytes = memory_bytes
        self.method = method_of(step) if method is None else method
        self.sites = {site.name: site for site in frame.sites(index) if site.name in schemes}
        self.schemes = {name: schemes[name] for name in self.sites}
        self.linears = {name: frame.module(site) for name, site in self.sites.items()}
        self.encoded: dict[str, Encoded] = {}
        self.changed: dict[str, Tensor] = {}
        self.layers: dict[str, Layer] = {}
        self._producers: dict[str, Producer] = {}
        self._producer_scales: dict[str, Tensor] = {}
        self._reach = kv_cache.Reach()
        self._twin: nn.Module | None = None  # the block as it was

    def run(self, activations: Activations, directory: Path) -> Block:
        """Compresses the block, moves the activations behind it, writes its codes."""
        began = time.monotonic()
        with self.frame.block(self.index) as module, torch.no_grad():
            self._twin = copy.deepcopy(module) if "drift" in self.step.wanted() else None
            if self.compares:
                self.calls.forward(self.index, module, activations.original)
            if len(activations.calibration):
                with kv_cache.observed(module, self._reach) if self.step.scales_cache else nullcontext():
                    self._calibrate(module, activations)
            elif self.team.leads:
                for group in computed_as_one(self.sites):  # engines want one scale where one serves a whole tensor
                    self._solve(group, None, None)
            if self.team.leads:
                self._settle()
                self._scale_cache(module)
            self.team.share_weights(module)
            self.changed = self.team.tensors(self.changed)
            rounding_cache = kv_cache.rounded(module, self._cache_scales(module))
            with rounding_inputs(self.schemes, self.linears, self._static_scales()), rounding_cache:
                self.calls.forward(self.index, module, activations.compressed)
        error = self._examine(activations)
        peaks = self.team.gather([peak_host_bytes(), peak_gpu_bytes()])
        if self.team.leads:
            path = block_file(directory, self.index)
            save_file(dict(tensors_of(self.encoded, self.changed)), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        return Block(
            index=self.index,
            seconds=time.monotonic() - began,
            peak_host_bytes=sum(host for host, _ in peaks),
            peak_gpu_bytes=max(gpu for _, gpu in peaks),
            relative_error=error,
            layers=[self.layers[name] for name in self.sites if name in self.layers],
        )

    def _calibrate(self, module: nn.Module, activations: Activations) -> None:
        """Compresses the block's linears on its calibration inputs, which it moves behind the block."""
        stream = activations.calibration
        batches = Batches(self.calls, self.index, stream)
        if self.step.by_block:
            self.calls.forward(self.index, module, activations.uncompressed)
            originals = {name: _weight(self.linears[name], self.sites[name]) for name in self.sites}
            dtype = self.frame.source.dtype
            work = BlockWork(module, self.linears, self.sites, self.schemes, batches, activations.uncompressed, dtype)
            for name, solution in self.method.quantize_block(work, self.step).items():
                self._keep(name, solution, originals.pop(name), None)
            self.calls.forward(self.index, module, stream)
            return
        wiring, size_bytes = self._probe(module, batches)
        groups = {group[0]: group for group in wiring.groups}
        leaders = {name: self.linears[name] for name in groups}

        def gathering(columns: int) -> Statistics:
            return Statistics(self.step.wanted(), columns, self.frame.device)

        def solve(name: str, statistics: Statistics) -> None:
            if self.team.leads:
                self._solve(groups[name], statistics, wiring.producer(module, name))
            for one in groups[name] if self.team.size > 1 else ():
                self.team.share(cast(Tensor, self.linears[one].weight).data)

        twin: Twin | None = None
        if self._twin is not None:
            inside = {one: path for path, one in module.named_modules()}
            twins = {name: self._twin.get_submodule(inside[one]) for name, one in leaders.items()}
            twin = (self._twin, Batches(self.calls, self.index, activations.uncompressed), twins)
            size_bytes *= 2
        if self.step.whole_blocks_read:
            columns = {name: self.sites[name].columns for name in leaders}
            for name, statistics in gathered(module, batches, leaders, gathering, columns, self.team).items():
                solve(name, statistics)
            self.calls.forward(self.index, module, stream)
        elif self._fits(size_bytes):
            outputs = run_in_lockstep(module, batches, leaders, gathering, solve, twin, self.team)
            for moved, own in zip((stream, activations.uncompressed), outputs, strict=True):
                for number, output in enumerate(own):
                    moved.replace(number, output.cpu())
        else:
            run_in_passes(module, batches, leaders, gathering, solve, twin, self.team)
            self.calls.forward(self.index, module, stream)
            if self._twin is not None:
                self.calls.forward(self.index, self._twin, activations.uncompressed)
        self._twin = None
        self._reach.widen(self.team)
        for name in self.sites if self.team.leads else ():
            if name not in self.encoded:  # no token came to it
                self._solve((name,), gathering(self.sites[name].columns), None)

    def _probe(self, module: nn.Module, batches: Batches) -> tuple[Wiring, int]:
        """How the block is wired, and how many bytes all batches may hold at once half way through it.

        In a team the leader finds out for all, and keeps to itself who can take over scales.
        """
        wiring, size_bytes, probe = Wiring((), {}), 0, batches.probe()
        tokens = probe[0].shape[1]
        if self.team.leads:
            linears = {name: (site, self.linears[name]) for name, site in self.sites.items()}
            wiring = wiring_of(module, linears, lambda: run(module, probe), hasattr(self.method, "fold"))
            size_bytes = held_bytes(module, probe)
        groups, size_bytes = self.team.tell([wiring.groups, size_bytes])
        groups = tuple(tuple(group) for group in groups)
        return replace(wiring, groups=groups), size_bytes * batches.tokens // tokens

    def _fits(self, size_bytes: int) -> bool:
        """Whether so much may be held at once, on every process of the team."""
        limit = self.memory_bytes
        if limit is None:
            limit = int(available_device_bytes(self.frame.device) * LOCKSTEP_SHARE)
        if self.frame.device.type == "cpu":  # whose memory the processes share
            limit //= self.team.size
        return all(self.team.gather(size_bytes <= limit))

    def _solve(self, group: tuple[str, ...], statistics: Statistics | None, producer: Producer | None) -> None:
        """Compresses the linears that read one input, those that are stored alike in one go."""
        fold = None
        if producer is not None:
            fold = self.method.fold(self._problem(group, statistics, None, producer.ties), self.step)
        if fold is not None and producer is not None:
            fold, by = producer.share(fold, self.frame.source.dtype)
            self._producers[producer.name], self._producer_scales[producer.name] = producer, by
            statistics = statistics and statistics.rescaled(1 / fold)
        return_free_memory()  # of what ran before: the heap keeps it, and here the most is needed
        for scheme in dict.fromkeys(self.schemes[name] for name in group):
            alike = tuple(name for name in group if self.schemes[name] == scheme)
            problem = self._problem(alike, statistics, fold)
            heights = problem.heights
            solution = getattr(self.method, self.step.kind)(problem, self.step)
            del problem  # or its weights would stand beside each linear's own
            start = 0
            for name, height in zip(alike, heights, strict=True):
                part = solution if len(alike) == 1 else _rows_of(solution, start, start + height)
                W = _weight(self.linears[name], self.sites[name])
                self._keep(name, part, W if fold is None else W.mul_(fold), statistics, fold)
                start += height

    def _problem(
        self, names: tuple[str, ...], statistics: Statistics | None, fold: Tensor | None, ties: Tensor | None = None
    ) -> Problem:
        """fold: by what the columns of the weights are multiplied. ties: as in `Wiring`."""
        heights = tuple(self.sites[name].rows for name in names)
        joined = torch.empty(sum(heights), self.sites[names[0]].columns, device=self.frame.device)
        for name, part in zip(names, torch.split(joined, list(heights)), strict=True):
            weight = cast(Tensor, self.linears[name].weight)
            part.copy_(weight.T if self.sites[name].transposed else weight)
        if fold is not None:
            joined.mul_(fold)
        return Problem(joined, statistics, self.schemes[names[0]], self.frame.source.dtype, names, heights, ties)

    def _keep(
        self, name: str, solution: Solution, W: Tensor, statistics: Statistics | None, fold: Tensor | None = None
    ) -> None:
        """Notes what became of one linear, and has it run with that from here on.

        W: (out, in) float32, what was to be stored. fold: by what its columns were multiplied; what makes the inputs
        has run already, so that here the columns are divided again.
        """
        site, scheme = self.sites[name], self.schemes[name]
        result = solution.encoded.dequantize(self.frame.dtype)
        effective = result if fold is None else (result.float() / fold).to(self.frame.dtype)
        weight = cast(Tensor, self.linears[name].weight)
        weight.copy_(effective.T if site.transposed else effective)
        self.encoded[name] = solution.encoded
        if scheme.activations == "float8-static":
            if statistics is None or statistics.moments is None:
                raise ValueError("static activations need the moments of the layer's inputs")
            self.changed[f"{name}.input_scale"] = static_scale(statistics.moments.largest, self.frame.source.dtype)
        self.layers[name] = _layer(site, scheme, solution, result - W, W, statistics)

    def _settle(self) -> None:
        """Has what makes the inputs take over its share, and every linear run with exactly what will be stored."""
        prefix = f"{self.frame.blocks_path}.{self.index}."
        dtype = self.frame.source.dtype
        for inner, scale in self._producer_scales.items():
            name, producer = prefix + inner, self._producers[inner].module
            site = self.sites.get(name)
            if site is not None:
                self.encoded[name] = self.encoded[name].divided(1 / scale, dtype)
                bias = getattr(producer, "bias", None)
                if bias is not None:
                    bias.copy_((bias.float() * scale).to(dtype))
            else:
                scale_outputs(producer, False, scale, offset=self._producers[inner].offset, dtype=dtype)
            for leaf, parameter in producer.named_parameters(recurse=False):
                if site is None or leaf != "weight":
                    self.changed[f"{name}.{leaf}"] = parameter.detach().clone()
        if self._producer_scales:
            for name, encoded in self.encoded.items():
                result, weight = encoded.dequantize(self.frame.dtype), cast(Tensor, self.linears[name].weight)
                weight.copy_(result.T if self.sites[name].transposed else result)

    def _scale_cache(self, module: nn.Module) -> None:
        """Finds the scales of keys and values, where they were asked for."""
        for name in kv_cache.attentions(module) if self.step.scales_cache else ():
            scales = self._reach.scales(name, self._producer_scales, self.frame.source.dtype)
            for leaf, scale in scales.items():
                self.changed[f"{self.frame.blocks_path}.{self.index}.{name}.{leaf}"] = scale

    def _cache_scales(self, module: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Of keys and values, by the name of an attention inside of the block; empty where none were asked for."""
        if not self.step.scales_cache:
            return {}
        prefix = f"{self.frame.blocks_path}.{self.index}."
        leaves = (kv_cache.KEY, kv_cache.VALUE)
        return {
            name: {leaf: self.changed[f"{prefix}{name}.{leaf}"] for leaf in leaves}
            for name in kv_cache.attentions(module)
        }

    def _static_scales(self) -> dict[str, Tensor]:
        suffix = ".input_scale"
        return {name.removesuffix(suffix): scale for name, scale in self.changed.items() if name.endswith(suffix)}

    def _examine(self, activations: Activations) -> float | None:
        """‖after − before‖² / ‖before‖² on the evaluation windows; raises NotFinite where a number is none."""
        for name in STREAMS:
            for hidden in getattr(activations, name):
                if not all_finite(hidden):
                    raise NotFinite(
                        f"decoder block {self.index} gives NaN or infinity on the {name} pass in {self.frame.dtype}; "
                        "the model is damaged, or its activations do not fit that type"
                    )
        changed = whole = 0.0
        windows = len(activations.original)
        for before, after in zip(activations.original, activations.compressed, strict=True):
            changed += float((after.float() - before.float()).square().sum(dtype=torch.float64))
            whole += float(before.float().square().sum(dtype=torch.float64))
        told = self.team.gather([changed, whole, windows])
        changed, whole, windows = (sum(one) for one in zip(*told, strict=True))
        return (changed / whole if whole else 0.0) if windows else None


def _weight(linear: nn.Module, site: Site) -> Tensor:
    weight = cast(Tensor, linear.weight)
    return (weight.T if site.transposed else weight).to(torch.float32, copy=True).contiguous()


def _rows_of(solution: Solution, start: int, stop: int) -> Solution:
    return Solution(solution.encoded.rows(start, stop), solution.damping, solution.escalations, solution.instead)


def _layer(
    site: Site, scheme: Scheme, solution: Solution, difference: Tensor, W: Tensor, statistics: Statistics | None
) -> Layer:
    if statistics is None:
        error = float(difference.square().sum() / W.square().sum().clamp_min(1e-30))
    else:
        error = statistics.error_of(difference, W)
    dense, zeros = scheme.element == "dense", pruned(W)
    kept = None if zeros is None else float((difference[zeros] == 0).float().mean())
    return Layer(
        name=site.name,
        element=scheme.ggml or scheme.element,
        bits=scheme.bits,
        group_size=scheme.columns(site.columns),
        relative_error=error,
        sparsity=solution.encoded.dequantize(torch.float32).eq(0).float().mean().item() if dense else None,
        zeros_kept=kept,
        damping=solution.damping,
        damping_escalations=solution.escalations,
        instead=solution.instead,
    )
