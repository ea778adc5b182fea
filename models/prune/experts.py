"""Leaves out experts of a mixture: those that add least to what their tokens become."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.distill.cutting import written
from models.files.checkpoint import SourceModel
from models.formats.directory import without_private
from models.formats.shards import Piece
from models.progress import Notify
from models.prune.slimming.looking import Looked, Looking, watched
from models.streaming.experts import Experts as Mixed
from models.streaming.frame import Frame
from squeeze.reports.experts import ExpertsLeft
from squeeze.shapes.mixtures import CHOSEN, EXPERT, Mixture, experts_left, mixture_of, routes, with_experts
from squeeze.shapes.model import BLOCK
from squeeze.shapes.slimmed import Sides
from squeeze.steps.slimming import Experts

IMPORTANCE = (
    "what the router weighs an expert with, times the length of what it puts out: mean over the tokens sent to it"
)


class Saliency:
    """Adds up g(x) · ‖f(x)‖ of each expert over the tokens that the router sends to it (arXiv 2510.13999, eq. 9).

    g: what its output is multiplied with, once the router has normed and scaled it as the family does.
    sums, float64, (blocks, experts): weighted; tokens, how many there were.
    """

    def __init__(self, frame: Frame) -> None:
        count = mixture_of(frame.source.config, frame.sides()).experts
        self.sums = {name: torch.zeros(frame.count, count, dtype=torch.float64) for name in ("weighted", "tokens")}

    @contextmanager
    def watching(self, index: int, block: nn.Module) -> Iterator[None]:
        gates: list[Tensor] = []  # of the tokens that each expert gets, in the order in which it does

        def sent(module: Mixed, given: tuple[Tensor, Tensor, Tensor]) -> None:
            _, chosen, weights = given
            flat = chosen.reshape(-1)
            counts = torch.bincount(flat, minlength=len(module)).tolist()
            gates[:] = torch.split(weights.reshape(-1)[flat.argsort(stable=True)].float(), counts)

        def put_out(number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
                weighted = gates[number] * output.float().norm(dim=-1)  # (n, C) -> (n,)
                self.sums["weighted"][index, number] += float(weighted.sum(dtype=torch.float64))
                self.sums["tokens"][index, number] += len(weighted)

            return hook

        hooks = []
        for mixed in (module for module in block.modules() if isinstance(module, Mixed)):
            hooks.append(mixed.register_forward_pre_hook(sent))
            hooks += [expert.register_forward_hook(put_out(number)) for number, expert in enumerate(mixed)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def seen(self, index: int, before: Tensor, after: Tensor) -> None:
        pass


def prune(importance: Tensor, left: int, groups: int) -> Tensor:
    """Places of the `left` most important, in order, int64: as many of each group; of equal ones the earlier.

    importance: (experts,), of groups that stand one behind the other. Routers that choose among groups first want them
    of one size.
    """
    order = torch.argsort(importance.view(groups, -1), dim=-1, descending=True, stable=True)
    own = order[:, : left // groups].sort(dim=-1).values
    return (own + torch.arange(groups)[:, None] * (len(importance) // groups)).flatten()


def planned(step: Experts, frame: Frame, sides: Sides) -> int:
    """Experts of a layer that stay; raises where that can't be. sides: of the model's tensors; needs config alone."""
    return experts_left(step, frame.source.config, sides)


def look(step: Experts, looking: Looking) -> Looked:  # noqa: ARG001 - there is one importance
    """What is judged."""
    return watched(looking, Saliency(looking.frame))


def smaller(
    step: Experts, source: SourceModel, sides: Sides, sums: Mapping[str, Tensor], out: Path, notify: Notify
) -> tuple[SourceModel, dict[str, object]]:
    """The smaller model on disk, and what the report says of it."""
    mixture, left = mixture_of(source.config, sides), experts_left(step, source.config, sides)
    # An expert that no token was sent to is the least important.
    importance = sums["weighted"] / sums["tokens"].clamp_min(1)
    mixed = [index for index in range(len(importance)) if sums["tokens"][index].any()]
    kept = {index: prune(importance[index], left, mixture.groups).tolist() for index in mixed}
    settings, _ = with_experts(left, source.config, sides)
    pieces = [_piece(source, name, kept, mixture) for name in sides if _stays(name, kept)]
    model = written(source, out, json.dumps(kept), without_private(settings), pieces, notify, _refuse_misfits)
    gone = {index: [n for n in range(mixture.experts) if n not in own] for index, own in kept.items()}
    sent = float(sum(sums["tokens"][index, own].sum() for index, own in gone.items()))
    told = ExpertsLeft(
        before=mixture.experts,
        after=left,
        chosen_before=mixture.chosen,
        chosen_after=settings.get(CHOSEN, mixture.chosen),
        removed={str(index): own for index, own in gone.items()},
        rerouted=sent / float(sums["tokens"].sum()),
    )
    return model, {"importance": IMPORTANCE, "experts": told}


def _stays(name: str, kept: Mapping[int, list[int]]) -> bool:
    expert = EXPERT.search(name)
    return expert is None or int(expert[2]) in kept[_block(name)]


def _piece(source: SourceModel, name: str, kept: Mapping[int, list[int]], mixture: Mixture) -> Piece:
    """Of a tensor that stays, under the name that its expert has now."""
    entry, expert = source.entries[name], EXPERT.search(name)
    routed = routes(name, entry.shape, mixture)
    new = name
    if expert is not None:
        new = EXPERT.sub(rf"\g<1>{kept[_block(name)].index(int(expert[2]))}\g<3>", name, count=1)
    shape = (len(kept[_block(name)]), *entry.shape[1:]) if routed else entry.shape

    def make() -> dict[str, Tensor]:
        tensor = source.tensor(name)
        return {new: tensor[kept[_block(name)]] if routed else tensor}

    return Piece({new: (entry.dtype, shape)}, make)


def _block(name: str) -> int:
    found = BLOCK.search(name)
    assert found is not None, "experts are of a block"
    return int(found[1])


def _refuse_misfits(model: SourceModel) -> None:
    Frame(model, torch.float32, torch.device("cpu")).refuse_misfits()
