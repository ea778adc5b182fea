"""Which linears of a block read the same input, and what makes that input: found by running the block, not by name.

A few tokens go through the block. Linears that are handed the same tensor share it. What can take over a scale of the
inputs (a norm's weight, the rows of an earlier linear) is found by trying: scale the one down and the columns of the
others up, by powers of two, which costs no rounding, and see whether the block still says the same. Norms that
multiply by 1 + weight are told from others that way, and so are values that grouped-query attention repeats: several
inputs of the attention's output then share a scale.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.weights.quantized import Site

TOLERANCE = 1e-6  # of the largest output; equal outputs differ by nothing, others by about a half
MOST_ROUNDING = 0.25  # of a scale; beyond, the weight it went into is next to nothing


@dataclass(frozen=True)
class Wiring:
    """groups: names of the sites that read one input, in the order in which they run. producers: by a group's first
    name, the module (its name inside of the block) that can take over a scale of the group's inputs. offsets: of these,
    the norms that multiply by 1 + weight. ties: by a group's first name, (in,) int64, the producer's output that each
    input comes from, where there are more inputs than outputs.
    """

    groups: tuple[tuple[str, ...], ...]
    producers: Mapping[str, str]
    offsets: frozenset[str] = frozenset()
    ties: Mapping[str, Tensor] = field(default_factory=dict)

    def producer(self, block: nn.Module, first: str) -> "Producer | None":
        """Of the group with that first name, where it has one."""
        name = self.producers.get(first)
        if name is None:
            return None
        return Producer(name, block.get_submodule(name), name in self.offsets, self.ties.get(first))


@dataclass(frozen=True)
class Producer:
    """What can take over a scale of a group's inputs. name: inside of the block. offset, ties: as in `Wiring`."""

    name: str
    module: nn.Module
    offset: bool
    ties: Tensor | None

    def share(self, fold: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(by what the inputs' columns are to be multiplied, (in,), by what the outputs are, (out,)), both float32.

        fold: by what a method wants the columns to be multiplied. They differ where several columns come from one
        output, and where a norm's weight, in `dtype`, can't take over exactly as much.
        """
        if self.ties is not None:
            rows = torch.zeros(int(self.ties.max()) + 1, device=fold.device).index_add_(0, self.ties, fold.log())
            by = (-rows / torch.bincount(self.ties)).exp()
            return 1 / by[self.ties], by
        by = achieved(self.module, 1 / fold, offset=self.offset, dtype=dtype)
        return 1 / by, by


def wiring_of(
    block: nn.Module, sites: Mapping[str, tuple[Site, nn.Module]], run: Callable[[], Tensor], folds: bool
) -> Wiring:
    """Wiring of a loaded block.

    sites: every linear that will be compressed. run: sends a few tokens through the block and returns its output.
    folds: whether producers are wanted.
    """
    order, inputs = _run_order(sites, run)
    groups: list[list[str]] = []
    for name in order:
        mates = next((group for group in groups if inputs[group[0]] is inputs[name]), None)
        if mates is None:
            groups.append([name])
        else:
            mates.append(name)
    del inputs
    producers: dict[str, str] = {}
    offsets: set[str] = set()
    ties: dict[str, Tensor] = {}
    for group in groups if folds else []:
        for trial in _trials(block, sites, group):
            if _takes(block, trial, sites, group, run):
                producers[group[0]] = trial.name
                if trial.offset:
                    offsets.add(trial.name)
                if trial.ties is not None:
                    ties[group[0]] = trial.ties
                break
    return Wiring(tuple(tuple(group) for group in groups), producers, frozenset(offsets), ties)


def scale_outputs(
    module: nn.Module, transposed: bool, by: Tensor, *, offset: bool = False, dtype: torch.dtype | None = None
) -> None:
    """Multiplies what a norm or linear puts out by `by`, (out,) float32: its weight's rows and its bias.

    offset: the norm multiplies by 1 + weight. dtype: that the result has to fit; None: the parameters' own.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    shaped = by if weight.dim() == 1 or transposed else by.unsqueeze(-1)
    one = float(offset)
    weight.copy_(((weight.float() + one) * shaped - one).to(dtype or weight.dtype))
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.copy_((bias.float() * by).to(dtype or bias.dtype))


def achieved(module: nn.Module, by: Tensor, *, offset: bool, dtype: torch.dtype) -> Tensor:
    """By what a norm's outputs really are multiplied once its scaled weight is rounded to `dtype`, (out,) float32."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dim() > 1:
        return by
    one = float(offset)
    gain = weight.float() + one
    real = ((gain * by - one).to(dtype).float() + one) / gain
    # A weight of nothing takes over nothing; and what underflowed could not be made up for.
    return torch.where(((real / by) - 1).abs() < MOST_ROUNDING, real, by)


def _run_order(
    sites: Mapping[str, tuple[Site, nn.Module]], run: Callable[[], Tensor]
) -> tuple[list[str], dict[str, Tensor]]:
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, given[0])

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, (_, module) in sites.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(inputs), inputs


@dataclass(frozen=True)
class _Trial:
    """A module that may make a group's inputs. offset, ties: as in `Wiring`."""

    name: str
    offset: bool = False
    ties: Tensor | None = None


def _trials(block: nn.Module, sites: Mapping[str, tuple[Site, nn.Module]], group: list[str]) -> Iterator[_Trial]:
    """What is worth trying: modules whose outputs are as many as the group's inputs, norms first, then those of which
    an attention may repeat each head's outputs.
    """
    columns = sites[group[0]][0].columns
    members = {id(sites[name][1]) for name in group}
    transposed = {id(module) for site, module in sites.values() if site.transposed}
    widths = {width for module in block.modules() if isinstance(width := getattr(module, "head_dim", None), int)}
    norms, linears, repeated = [], [], []
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() > 2 or id(module) in members:
            continue
        outputs = weight.shape[-1] if id(module) in transposed else weight.shape[0]
        if outputs == columns and weight.dim() == 1:
            norms += [_Trial(name), _Trial(name, offset=True)]
        elif outputs == columns:
            linears.append(_Trial(name))
        elif weight.dim() == 2 and columns % outputs == 0:
            fitting = [width for width in widths if outputs % width == 0]
            repeated += [_Trial(name, ties=_repeats(columns, outputs, width, weight.device)) for width in fitting]
    yield from [*norms, *linears, *repeated]


def _repeats(columns: int, outputs: int, head_width: int, device: torch.device) -> Tensor:
    """Of each input the output that it is, where every head of the outputs stands several times in a row."""
    heads = torch.arange(outputs, device=device).view(-1, head_width)
    return heads.repeat_interleave(columns // outputs, dim=0).flatten()


def _takes(
    block: nn.Module,
    trial: _Trial,
    sites: Mapping[str, tuple[Site, nn.Module]],
    group: list[str],
    run: Callable[[], Tensor],
) -> bool:
    """Whether the block says the same with the module's outputs scaled down and the group's columns up, and says
    something else where only the first is done: what was not seen to matter is not proven either.
    """
    module = block.get_submodule(trial.name)
    transposed = any(site.transposed and one is module for site, one in sites.values())
    with _put_back([module, *(sites[one][1] for one in group)]):
        weight = module.weight
        assert isinstance(weight, Tensor)
        if trial.offset:
            weight.zero_()  # a gain of 1, of which powers of two are exact
        expected = run()
        margin = TOLERANCE * float(expected.abs().max())
        outputs = weight.shape[-1] if weight.dim() == 1 or transposed else weight.shape[0]
        powers = torch.randint(0, 3, (outputs,), generator=torch.Generator().manual_seed(0))
        scale = (2.0 ** (powers - 1)).to(expected.device)  # ½, 1 or 2
        scale_outputs(module, transposed, 1 / scale, offset=trial.offset)
        if float((run() - expected).abs().max()) <= margin:
            return False
        by = scale if trial.ties is None else scale[trial.ties]
        for one in group:
            site, linear = sites[one]
            columns = linear.weight
            assert isinstance(columns, Tensor)
            columns.mul_(by.unsqueeze(-1).to(columns.dtype) if site.transposed else by.to(columns.dtype))
        return float((run() - expected).abs().max()) <= margin


@contextmanager
def _put_back(modules: list[nn.Module]) -> Iterator[None]:
    """Restores the modules' own parameters at exit."""
    kept = [
        (parameter, parameter.detach().clone()) for module in modules for parameter in module.parameters(recurse=False)
    ]
    try:
        yield
    finally:
        for parameter, value in kept:
            parameter.copy_(value)
