"""What cutting each linear to each rank would lose, before any is cut: on inputs of the whole model.

Where outputs are weighed by gradients, those come first, of a small part of the text, forwards and then backwards.
Then all of the text goes forwards, block by block, and of every group of linears that read one input the decompositions
are made, of each alone and of all together. Nothing is kept of them but what each rank loses. Blocks that an earlier
attempt looked at are not looked at again.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.bits.sensitivity import GRADIENT_LENGTH, GRADIENT_SEQUENCES, sketch_file, sketch_gradients
from models.progress import Notify
from models.prune.svd import losses_of
from models.resources import return_free_memory
from models.streaming.calls import Batches, Calls, run
from models.streaming.frame import Frame
from models.streaming.statistics import Hessian, Statistics
from models.streaming.streams import Room, Stream
from models.streaming.wiring import wiring_of
from models.weights.quantized import Site
from squeeze.steps.factoring import SVD

SKETCH_ROWS = 512  # of gradients: a quarter of what full moments gain over none is lost with so many


@dataclass(frozen=True)
class Group:
    """Linears that read one input. losses: what each loses alone at rank 0, at one multiple, at two, and so on, up to
    as many as it has inputs or outputs; empty where no token came to it, or no gradient: nobody knows then. together:
    of all, as one linear; empty where it stands alone.
    """

    names: tuple[str, ...]
    losses: tuple[tuple[float, ...], ...]
    together: tuple[float, ...]


@dataclass(frozen=True)
class Gradients:
    """Random sums of gradients at the outputs of linears, on disk. scale: by what they are multiplied."""

    directory: Path
    scale: float

    def of(self, index: int, names: Sequence[str], device: torch.device) -> tuple[Tensor, ...] | None:
        """(n, out) of each of these linears of a block; None where none came to any."""
        with safe_open(sketch_file(self.directory, index), framework="pt") as held:
            found = tuple(held.get_tensor(name).mul_(self.scale).to(device) for name in names)
        return found if any(bool(one.any()) for one in found) else None


def measured(
    frame: Frame,
    step: SVD,
    names: Sequence[str],
    calibration: Tensor,
    directory: Path,
    fingerprint: str,
    room: Room,
    notify: Notify,
) -> tuple[list[Group], Gradients | None]:
    """Of the linears with these names. calibration: (n, T) int64.

    directory: kept between attempts with the same fingerprint; gradients stay there for the step itself.
    """
    mark = directory / "fingerprint"
    if directory.exists() and (not mark.is_file() or mark.read_text() != fingerprint):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark.write_text(fingerprint)
    few = calibration[:GRADIENT_SEQUENCES, :GRADIENT_LENGTH]
    gradients: Gradients | None = None
    calls: Calls | None = None
    if step.gradients:
        # Half of the squares is the predicted divergence.
        gradients = Gradients(directory, (2 * SKETCH_ROWS * few.numel()) ** -0.5)
        if not (directory / "sketched").is_file():
            calls = Calls(frame, [few, calibration])
            sketch_gradients(frame, names, calls, few, directory, room, notify, SKETCH_ROWS)
            (directory / "sketched").touch()
    if step.ranks == "uniform":
        return [], gradients
    if not _file(directory, frame.count - 1).is_file():
        _look(frame, step, names, calls or Calls(frame, [calibration]), calibration, directory, gradients, room, notify)
    files = [_file(directory, index) for index in range(frame.count)]
    return [_group(one) for file in files for one in json.loads(file.read_text())], gradients


def _group(told: Mapping[str, list[list[float]]]) -> Group:
    return Group(**told)  # type: ignore[arg-type]  # lists for tuples


def _file(directory: Path, index: int) -> Path:
    return directory / f"block-{index:05d}.json"


def _look(
    frame: Frame,
    step: SVD,
    names: Sequence[str],
    calls: Calls,
    calibration: Tensor,
    directory: Path,
    gradients: Gradients | None,
    room: Room,
    notify: Notify,
) -> None:
    wanted = set(names)
    stream = Stream(room, calls.enter(calibration))
    for index in range(frame.count):
        file = _file(directory, index)
        sites = {site.name: site for site in frame.sites(index) if site.name in wanted}
        with frame.block(index) as module, torch.no_grad():
            if file.is_file():
                calls.forward(index, module, stream)
            else:
                found = _block(frame, step, calls, index, module, sites, stream, gradients)
                file.with_suffix(".part").write_text(json.dumps([asdict(one) for one in found]))
                file.with_suffix(".part").replace(file)
        return_free_memory()
        notify.advance(index + 1, frame.count, "blocks")
    stream.clear()


def _block(
    frame: Frame,
    step: SVD,
    calls: Calls,
    index: int,
    module: nn.Module,
    sites: Mapping[str, Site],
    stream: Stream,
    gradients: Gradients | None,
) -> list[Group]:
    """Moves the stream behind the block."""
    linears = {name: (site, frame.module(site)) for name, site in sites.items()}
    probe = Batches(calls, index, stream).probe()
    groups = wiring_of(module, linears, lambda: run(module, probe), False).groups
    statistics = {group[0]: Statistics(step.statistics, sites[group[0]].columns, frame.device) for group in groups}
    handles = [
        linears[name][1].register_forward_pre_hook(lambda _, given, name=name: statistics[name].add(given[0]))
        for name in statistics
    ]
    try:
        calls.forward(index, module, stream)
    finally:
        for handle in handles:
            handle.remove()
    return_free_memory()  # of what ran: the heap keeps it, and here the most is needed
    found = []
    for group in groups:
        hessian = statistics.pop(group[0]).hessian
        assert hessian is not None
        weights = {name: _weight(*linears[name]) for name in group}

        def losses(
            some: Sequence[str], hessian: Hessian = hessian, weights: Mapping[str, Tensor] = weights
        ) -> tuple[float, ...]:
            seen = None if gradients is None else gradients.of(index, some, frame.device)
            if hessian.count == 0 or (seen is None and gradients is not None):
                return ()
            return _losses(torch.cat([weights[name] for name in some]), hessian, seen, step)

        alone = tuple(losses([name]) for name in group)
        together = losses(group) if len(group) > 1 and all(alone) else ()
        found.append(Group(group, alone, together))
    return found


def _losses(W: Tensor, hessian: Hessian, gradients: Sequence[Tensor] | None, step: SVD) -> tuple[float, ...]:
    values = losses_of(W, hessian, step.damping, gradients)
    rest = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    return tuple(rest[:: step.rank_multiple].tolist())


def _weight(site: Site, linear: nn.Module) -> Tensor:
    weight = cast(Tensor, linear.weight)
    return (weight.T if site.transposed else weight).to(torch.float32, copy=True).contiguous()
