"""What rounding each linear would cost, for every number of bits that it may get: predicted divergence in nats a token.

A model that is changed a little diverges by ½ E[(gᵀ ΔW x)²]: x are a linear's inputs, g the gradients at its outputs of
the log-likelihood of tokens that the model draws from its own predictions (the Fisher information). With g and x taken
as independent of each other this is ½ tr(G ΔW H ΔWᵀ), G = E[g gᵀ], H = E[x xᵀ] (arXiv 1503.05671 §3). Held against the
true divergence on the bundled model, one group of linears rounded at a time, it is off by a factor of 1.1 to 1.2, and
within one number of bits the logarithms correlate by 0.97 to 1.00. The relative output error is off by 1.7 to 2.4
around its own mean and correlates by 0.3 to 0.8, the error of the block's output by 0.6 to 0.9.

Gradients come from a small part of the calibration set, streamed through the blocks forwards, then backwards. Of G a
sketch is kept: so many random sums of gradients. Then the whole set streams forwards; every block's linears are
rounded by the step's own method to every candidate, on inputs of the uncompressed model, and nothing is kept but the
errors. Blocks that an earlier attempt measured are not measured again.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.progress import Notify
from models.quantize import rtn
from models.quantize.problem import Problem
from models.resources import return_free_memory
from models.streaming.block import method_of
from models.streaming.calls import Batches, Calls, run
from models.streaming.frame import Frame
from models.streaming.statistics import Statistics
from models.streaming.streams import Room, Stream
from models.streaming.wiring import Wiring, wiring_of
from models.weights.quantized import Site
from squeeze.steps.compressing import Statistic
from squeeze.steps.quantization import RTN, Grouped, Quantize
from squeeze.steps.schemes import Scheme

GRADIENT_SEQUENCES, GRADIENT_LENGTH = 16, 512
SKETCH_ROWS = 128  # of a sketch; the estimate's spread is at most √(2/128), an eighth, and the same for all candidates
HEAD_BYTES = 128 << 20  # of one float32 slice of logits

Errors = dict[str, dict[int, float]]  # of linears, by bits: predicted divergence, nats a token


def measure(
    frame: Frame,
    step: Grouped,
    schemes: Mapping[str, Scheme],
    candidates: Sequence[int],
    calibration: Tensor,
    directory: Path,
    fingerprint: str,
    room: Room,
    notify: Notify,
) -> Errors:
    """Of every linear with a scheme, which says all but the bits. calibration: (n, T) int64.

    directory: kept between attempts with the same fingerprint. room: for hidden states.
    """
    mark = directory / "fingerprint"
    if directory.exists() and (not mark.is_file() or mark.read_text() != fingerprint):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark.write_text(fingerprint)
    whole = directory / "errors.json"
    if not whole.is_file():
        few = calibration[:GRADIENT_SEQUENCES, :GRADIENT_LENGTH]
        calls = Calls(frame, [few, calibration])
        if not (directory / "sketched").is_file():
            sketch_gradients(frame, schemes, calls, few, directory, room, notify)
            (directory / "sketched").touch()
        trial = _Trial(frame, step, schemes, candidates, calls, few.numel())
        errors = trial.run(calibration, directory, room, notify)
        part = whole.with_suffix(".part")
        part.write_text(json.dumps(errors))
        part.replace(whole)
        for file in directory.glob("block-*"):
            file.unlink()
    found = json.loads(whole.read_text())
    return {name: {int(bits): error for bits, error in trials.items()} for name, trials in found.items()}


def sketch_gradients(
    frame: Frame,
    names: Collection[str],
    calls: Calls,
    ids: Tensor,
    directory: Path,
    room: Room,
    notify: Notify,
    rows: int = SKETCH_ROWS,
) -> None:
    """Writes random sums of the gradients at the outputs of these linears, (rows, out), one file a block: divided by
    rows and tokens, their second moment is on average that of the gradients. ids: (n, T) int64.
    """
    dice = torch.Generator().manual_seed(0)
    drawer = Room(0, directory / "before")  # all on disk, since there are more of them with every block
    before: list[Stream] = []  # hidden states before each block
    hidden = Stream(room, calls.enter(ids))
    for index in range(frame.count):
        before.append(Stream(drawer, hidden))
        with frame.block(index) as module, torch.no_grad():
            calls.forward(index, module, hidden)
        return_free_memory()
        notify.advance(index + 1, 2 * frame.count, "blocks")
    _gradients_of_head(frame, ids, hidden, dice)
    for index in reversed(range(frame.count)):
        sites = [site for site in frame.sites(index) if site.name in names]
        sums = {site.name: torch.zeros(rows, site.rows, device=frame.device) for site in sites}
        with frame.block(index) as module, _summing(frame, sites, sums, dice), torch.enable_grad():
            for number in range(len(hidden)):
                given, args, kwargs = calls.batch(index, before[index][number])
                given = given.detach().requires_grad_()
                torch.autograd.backward(run(module, (given, args, kwargs)), hidden[number].to(frame.device))
                hidden.replace(number, cast(Tensor, given.grad).cpu())
        save_file({name: total.cpu() for name, total in sums.items()}, sketch_file(directory, index))
        before.pop().clear()
        notify.advance(2 * frame.count - index, 2 * frame.count, "blocks")
    hidden.clear()


def sketch_file(directory: Path, index: int) -> Path:
    """Of one block's sketches."""
    return directory / f"block-{index:05d}.sketch"


def _gradients_of_head(frame: Frame, ids: Tensor, hidden: Stream, dice: torch.Generator) -> None:
    """Puts in the place of the last hidden states the gradients there of −log p of tokens drawn from p."""
    vocabulary = int(frame.model.config.vocab_size)
    rows = max(16, HEAD_BYTES // (4 * vocabulary))
    with frame.surroundings(), torch.enable_grad():
        start = 0
        for number in range(len(hidden)):
            states = hidden[number].to(frame.device)
            own = ids[start : start + len(states)]
            start += len(states)
            gradients = torch.zeros_like(states)
            for n in range(len(states)):
                for first in range(0, states.shape[1], rows):
                    part = slice(first, min(first + rows, states.shape[1]))
                    given = states[n : n + 1, part].detach().requires_grad_()
                    likelihood = torch.log_softmax(frame.leave(given, own[n : n + 1, part])[0].float(), dim=-1)
                    drawn = torch.multinomial(likelihood.detach().exp().cpu(), 1, generator=dice)
                    torch.autograd.backward(likelihood.gather(-1, drawn.to(frame.device)).sum().neg())
                    gradients[n, part] = cast(Tensor, given.grad)[0]
            hidden.replace(number, gradients.cpu())


@contextmanager
def _summing(frame: Frame, sites: Sequence[Site], sums: Mapping[str, Tensor], dice: torch.Generator) -> Iterator[None]:
    """Meanwhile, what comes back to the sites' outputs is added to the sums, every token with random signs."""

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(gradient: Tensor) -> None:
            g = gradient.reshape(-1, gradient.shape[-1]).float()
            signs = torch.randint(0, 2, (len(sums[name]), len(g)), generator=dice).mul_(2).sub_(1)
            sums[name].addmm_(signs.to(g), g)

        def watch(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(add)  # type: ignore[no-untyped-call]

        return watch

    handles = [frame.module(site).register_forward_hook(hook(site.name)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Trial:
    """Rounds every linear to every candidate, and notes what that would cost."""

    def __init__(
        self,
        frame: Frame,
        step: Grouped,
        schemes: Mapping[str, Scheme],
        candidates: Sequence[int],
        calls: Calls,
        tokens: int,
    ) -> None:
        self.frame, self.schemes, self.candidates, self.calls, self.tokens = frame, schemes, candidates, calls, tokens
        # What works on whole blocks would take its whole time for every candidate; rounding to nearest ranks alike.
        self.step: Quantize = RTN(method="rtn") if step.by_block else step
        self.method = rtn if step.by_block else method_of(step)

    def run(self, calibration: Tensor, directory: Path, room: Room, notify: Notify) -> Errors:
        stream = Stream(room, self.calls.enter(calibration))
        errors: Errors = {}
        for index in range(self.frame.count):
            file = directory / f"block-{index:05d}.json"
            sites = {site.name: site for site in self.frame.sites(index) if site.name in self.schemes}
            with self.frame.block(index) as module, torch.no_grad():
                if file.is_file():
                    self.calls.forward(index, module, stream)
                else:
                    found = self._block(index, module, sites, stream, load_file(sketch_file(directory, index)))
                    file.with_suffix(".part").write_text(json.dumps(found))
                    file.with_suffix(".part").replace(file)
            errors |= json.loads(file.read_text())
            return_free_memory()
            notify.advance(index + 1, self.frame.count, "blocks")
        stream.clear()
        return errors

    def _block(
        self, index: int, module: nn.Module, sites: Mapping[str, Site], stream: Stream, sketches: Mapping[str, Tensor]
    ) -> Errors:
        """Moves the stream behind the block."""
        linears = {name: (site, self.frame.module(site)) for name, site in sites.items()}
        probe = Batches(self.calls, index, stream).probe()
        wiring = wiring_of(module, linears, lambda: run(module, probe), hasattr(self.method, "fold"))
        leading = {group[0]: group for group in wiring.groups}
        # A linear of an expert that no token of the probe came to stands in no group.
        alone = [name for name in sites if not any(name in group for group in wiring.groups)]
        leading |= {name: (name,) for name in alone}
        wanted: frozenset[Statistic] = self.step.wanted() | {"hessian"}
        statistics = {name: Statistics(wanted, sites[name].columns, self.frame.device) for name in leading}
        handles = [
            linears[name][1].register_forward_pre_hook(lambda _, given, name=name: statistics[name].add(given[0]))
            for name in leading
        ]
        try:
            self.calls.forward(index, module, stream)
        finally:
            for handle in handles:
                handle.remove()
        found: Errors = {}
        for name, group in leading.items():
            weights = {one: _weight(*linears[one]) for one in group}
            for bits in self.candidates:
                for one, D in self._differences(weights, statistics[name], bits, wiring, name).items():
                    S = sketches[one].to(self.frame.device)
                    found.setdefault(one, {})[bits] = self._cost(S, D, statistics[name])
            del statistics[name]
        return {name: found[name] for name in sites}

    def _differences(
        self, weights: Mapping[str, Tensor], statistics: Statistics, bits: int, wiring: Wiring, leader: str
    ) -> dict[str, Tensor]:
        """Rounded less original weight of linears that read one input, (out, in) float32."""
        joined = torch.cat(list(weights.values()))
        scheme = replace(self.schemes[leader], bits=bits)
        heights = tuple(len(W) for W in weights.values())
        dtype = self.frame.source.dtype
        own = statistics if self.step.wanted() else None
        problem = Problem(joined.clone(), own, scheme, dtype, tuple(weights), heights)
        fold = None
        if leader in wiring.producers:
            problem = replace(problem, ties=wiring.ties.get(leader))
            fold = self.method.fold(problem, self.step)
        if fold is not None:
            scaled = own and own.rescaled(1 / fold)
            problem = Problem(joined * fold, scaled, scheme, dtype, tuple(weights), heights)
        result = self.method.quantize(problem, self.step).encoded.dequantize(torch.float32)
        if fold is not None:
            result = result / fold
        return dict(zip(weights, (result - joined).split(heights), strict=True))

    def _cost(self, S: Tensor, D: Tensor, statistics: Statistics) -> float:
        """½ tr(G D H Dᵀ), G = SᵀS / (SKETCH_ROWS · tokens). S: (SKETCH_ROWS, out). D: (out, in)."""
        assert statistics.hessian is not None
        P = S @ D  # (SKETCH_ROWS, in)
        energy = statistics.hessian.energy(P) / max(statistics.count, 1)
        return max(0.0, energy) / (2 * SKETCH_ROWS * self.tokens)


def _weight(site: Site, linear: nn.Module) -> Tensor:
    weight = cast(Tensor, linear.weight)
    return (weight.T if site.transposed else weight).to(torch.float32, copy=True).contiguous()
