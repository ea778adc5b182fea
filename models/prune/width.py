"""Leaves out neurons, attention heads and channels of the hidden state: those that put out least."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.distill.cutting import written
from models.files.checkpoint import SourceModel
from models.formats.directory import without_private
from models.formats.shards import Piece
from models.progress import Notify
from models.prune.slimming import gradient, pacing
from models.prune.slimming.looking import Looked, Looking, watched
from models.streaming.frame import Frame
from squeeze.costs.slimming_work import judged_sequences
from squeeze.shapes.model import BLOCK
from squeeze.shapes.slimmed import Sides
from squeeze.shapes.widths import FAMILIES, Family, Widths, axes_of, sides_at, widths_left, widths_of
from squeeze.steps.slimming import Width

IMPORTANCE = {
    "activation": "magnitudes of what neurons put out, lengths of what heads do, magnitudes of normed channels: mean "
    "over the tokens of a sequence, root of the sum of squares over sequences",
    "gradient": "what the loss of the text would change by to first order, added up over all weights of a neuron, a "
    "group of heads or a channel: |w · ∂L/∂w|",
}
LAST_NORM = "model.norm.weight"
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


class Outputs:
    """Adds up what neurons, heads and channels put out (arXiv 2407.14679 §2.2), squared, sequence by sequence.

    sums, float64: neurons (blocks, inner); heads (blocks, heads); channels (norms, hidden), the norms of each block in
    their family's order, those behind its parts none; normed (norms, hidden), of each norm's inputs over their root
    mean square, squares; tokens (1,).
    """

    def __init__(self, frame: Frame) -> None:
        self._widths, self._count = widths_of(frame.source.config, frame.sides()), frame.count
        self._family = family_of(frame.source)
        norms = len(self._family.norms) * frame.count + 1
        sides = {
            "neurons": (frame.count, self._widths.inner),
            "heads": (frame.count, self._widths.heads),
            "channels": (norms, self._widths.hidden),
            "normed": (norms, self._widths.hidden),
            "tokens": (1,),
        }
        self.sums = {name: torch.zeros(each, dtype=torch.float64) for name, each in sides.items()}
        key = frame.source.file_key(LAST_NORM)
        assert key is not None, "the files were compared with the config"
        self._last_norm = self._gain(frame.source.tensor(key).to(frame.device))

    @contextmanager
    def watching(self, index: int, block: nn.Module) -> Iterator[None]:
        def neurons(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            self._add("neurons", index, given[0].float().abs())

        def heads(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            outputs = given[0].float()
            by_head = outputs.view(*outputs.shape[:2], self._widths.heads, -1)  # (B, T, H·d) -> (B, T, H, d)
            self._add("heads", index, by_head.norm(dim=-1))

        norms = self._family.norms

        def norm(place: int, name: str) -> Hook:
            def behind(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                self._even(place, given[0])

            def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                self._normed(place, given[0], self._gain(module.get_parameter("weight")))

            return behind if name in self._family.behind else before

        places: dict[str, Hook] = {"mlp.down_proj": neurons, "self_attn.o_proj": heads}
        places |= {name: norm(len(norms) * index + n, name) for n, name in enumerate(norms)}
        hooks = [block.get_submodule(name).register_forward_pre_hook(hook) for name, hook in places.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def seen(self, index: int, before: Tensor, after: Tensor) -> None:
        if index == 0:
            self.sums["tokens"] += before.shape[0] * before.shape[1]
        if index == self._count - 1:
            self._normed(len(self._family.norms) * self._count, after, self._last_norm)

    def _gain(self, weight: Tensor) -> Tensor:
        return weight.float() + 1 if self._family.shifted else weight.float()

    def _normed(self, place: int, hidden: Tensor, gain: Tensor) -> None:
        """hidden: (B, T, C), what a norm is given. gain: (C,), what it multiplies by."""
        self._add("channels", place, (self._even(place, hidden) * gain).abs())

    def _even(self, place: int, hidden: Tensor) -> Tensor:
        """hidden over its root mean square, which is added up."""
        even = hidden.float()
        even = even * torch.rsqrt(even.square().mean(dim=-1, keepdim=True).clamp_min(1e-30))
        self.sums["normed"][place] += even.square().sum(dim=(0, 1), dtype=torch.float64).cpu()
        return even

    def _add(self, name: str, place: int, outputs: Tensor) -> None:
        """outputs: (B, T, n), none negative."""
        self.sums[name][place] += outputs.mean(dim=1, dtype=torch.float64).square().sum(dim=0).cpu()


def family_of(source: SourceModel) -> Family:
    return FAMILIES[str(source.config["model_type"])]


def prune(importance: Tensor, left: int) -> Tensor:
    """Places of the `left` most important, in order, int64; of equal ones the earlier. importance: (n,)."""
    return torch.argsort(importance, descending=True, stable=True)[:left].sort().values


def planned(step: Width, frame: Frame, sides: Sides) -> Widths:
    """What stays; raises where that can't be. sides: of the model's tensors; needs its config alone."""
    return widths_left(step, frame.source.config, sides)


def look(step: Width, looking: Looking) -> Looked:
    """What is judged, and the size that is quick enough."""
    paced = pacing.of_widths(step, looking) if step.speed_target is not None else {}
    if step.importance == "activation":
        found = watched(looking, Outputs(looking.frame))
        return Looked({**found.sums, **paced}, found.original)
    some = replace(looking, ids=looking.ids[: judged_sequences(*looking.ids.shape)])
    found = watched(some, Outputs(looking.frame))  # for how loud the norms' inputs are
    back = gradient.looked(replace(some, windows=None, directory=looking.directory.with_name("gradient")))
    return Looked({**found.sums, **back.sums, **paced}, found.original)


def smaller(
    step: Width, source: SourceModel, sides: Sides, sums: Mapping[str, Tensor], out: Path, notify: Notify
) -> tuple[SourceModel, dict[str, object]]:
    """The smaller model on disk, and what the report says of it."""
    whole, left = widths_of(source.config, sides), widths_left(step, source.config, sides)
    found: dict[str, object] = {}
    if step.speed_target is not None:
        left, found["speed_target"] = pacing.paced_widths(whole, sums), pacing.told(step, sums)
    kept = _Kept(step, family_of(source), whole, left, sums)
    made = sides_at(left, sides)
    pieces = [_piece(source, name, made[name], kept) for name in sides]
    settings = without_private(source.config) | left.settings
    chosen = [kept.channels.tolist(), *(one.tolist() for one in (*kept.neurons, *kept.groups))]
    model = written(source, out, json.dumps(chosen), settings, pieces, notify)
    return model, {
        "importance": IMPORTANCE[step.importance],
        "widths": left.settings,
        "widths_before": whole.settings,
    } | found


class _Kept:
    """Places that stay, int64. neurons, groups: of each block. channels: of the model."""

    def __init__(self, step: Width, family: Family, whole: Widths, left: Widths, sums: Mapping[str, Tensor]) -> None:
        self._whole, self._normed, self._tokens = whole, sums["normed"], float(sums["tokens"])
        self.family, self.narrower = family, left.hidden < whole.hidden
        self.softer = (left.hidden / whole.hidden) ** 0.5 if family.scaled else 1.0
        neurons, groups, channels = _importances(step, whole, sums)
        self.channels = prune(channels, left.hidden)
        self.neurons = [prune(one, left.inner) for one in neurons]
        self.groups = [prune(one, left.groups) for one in groups]

    def along(self, axis: str, block: int) -> Tensor:
        """Places along a side of a block's tensor; of what lies outside of blocks only channels are asked for."""
        if axis == "hidden":
            return self.channels
        if axis == "inner":
            return self.neurons[block]
        per_group = self._whole.dimension * (self._whole.each if axis == "query" else 1)
        return (self.groups[block][:, None] * per_group + torch.arange(per_group)).flatten()

    def louder(self, norm: int) -> float:
        """Root mean square of the channels that stay, over that of all, of what a norm is given."""
        return float((self._normed[norm][self.channels].mean() / self._tokens).sqrt())


def _importances(step: Width, whole: Widths, sums: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of neurons (blocks, inner), of groups of heads (blocks, groups) and of channels (hidden,)."""
    if step.importance == "gradient":
        return sums[gradient.NEURONS], sums[gradient.GROUPS], sums[gradient.CHANNELS]
    # A group counts as much as its heads together, a channel as much as before all norms.
    groups = sums["heads"].sqrt().view(-1, whole.groups, whole.each).sum(dim=-1)
    return sums["neurons"], groups, sums["channels"].sqrt().sum(dim=0)


def _piece(source: SourceModel, name: str, sides: tuple[int, ...], kept: _Kept) -> Piece:
    entry, found = source.entries[name], BLOCK.search(name)
    block = -1 if found is None else int(found[1])

    def make() -> dict[str, Tensor]:
        tensor = source.tensor(name)
        for dimension, axis in enumerate(axes_of(name)):
            if axis is not None:
                tensor = tensor.index_select(dimension, kept.along(axis, block))
        return {name: _scaled(name, tensor, block, kept)}

    return Piece({name: (entry.dtype, sides)}, make)


def _scaled(name: str, tensor: Tensor, block: int, kept: _Kept) -> Tensor:
    """A norm's weight, so that what stays leaves it as loud as before: it divides by the root mean square of what it
    is given, and the channels that stay are louder than all together. Minitron leaves that to the training.

    Where a family multiplies embeddings by the root of how many channels there are, they are softer with fewer; what
    the blocks add to them is made softer by as much, and the norms even that out.
    """
    family, module = kept.family, name.rsplit(".", 2)[-2]
    if not kept.narrower:
        return tensor
    adds = family.behind or ("o_proj", "down_proj")
    factor = kept.softer if module in adds else 1.0
    if module in (*family.norms, "norm"):
        place = -1 if module == "norm" else len(family.norms) * block + family.norms.index(module)
        factor *= kept.louder(place)
        if family.shifted:
            return ((tensor.float() + 1) * factor - 1).to(tensor.dtype)
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)
