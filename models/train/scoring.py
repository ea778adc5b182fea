"""Losses of batches: of the learned tokens alone, each example by itself."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from models.train.examples import Examples
from models.train.packing import UNSCORED, Batch, Row
from models.train.processes import ALONE, Processes
from models.train.zero import Zero
from squeeze.errors import NotFinite

# By what the logits of an example may differ, over their own spread. When the example before it is another: by nothing,
# but for mixtures of experts, whose products depend on how many tokens an expert gets. When none stands before it: sums
# come in another order.
LEAK_TOLERANCE = {torch.float32: 1e-4}
POSITION_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


def own(model: Any) -> Any:
    """transformers' model, where peft has wrapped it, or what shares gradients."""
    if isinstance(model, DistributedDataParallel | Zero):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Objective(Protocol):
    """What a training makes less: of each learned token of a batch, (n,) float32, in the order of the batch."""

    def __call__(self, model: Any, batch: Batch, *, packed: bool) -> Tensor: ...


@runtime_checkable
class Turning(Protocol):
    """An objective that draws: told where the training is, it draws the same in every process and in every attempt."""

    def turn_to(self, seed: int, step: int) -> None: ...


def logits_of(model: Any, batch: Batch, *, packed: bool) -> Tensor:
    """(B, T, V) in the type of the computation. packed: examples share sequences.

    Without a mask transformers (5.23) makes one out of positions that begin anew: a token then sees only those of its
    own example. Where each sequence holds one example, causality alone keeps what fills it up out.
    """
    return _logits(model, batch, packed=packed)[:, -batch.ids.shape[1] :]  # without those of virtual tokens


def learned_losses(model: Any, batch: Batch, *, packed: bool) -> Tensor:
    """Negative log-likelihood of each learned token, nats: (n,) float32, in the order of the batch."""
    return against_text(learned_logits(model, batch, packed=packed), batch)


def against_text(logits: Tensor, batch: Batch) -> Tensor:
    """As `learned_losses`, of their logits (n, V)."""
    return F.cross_entropy(logits.float(), batch.targets[batch.targets != UNSCORED], reduction="none")


def learned_logits(model: Any, batch: Batch, *, packed: bool) -> Tensor:
    """What the model says of each learned token: (n, V) in the type of the computation, in the order of the batch.

    The output head sees the positions alone whose next token is learned: logits are the largest thing that a small
    model holds, and of a prompt or of what fills a sequence up nobody asks for them.
    """
    learned = batch.targets != UNSCORED

    def chosen(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = given[0][:, -learned.shape[1] :]  # without virtual tokens
        return (hidden[learned], *given[1:])  # (B, T, C) -> (n, C)

    hook = own(model).get_output_embeddings().register_forward_pre_hook(chosen)
    try:
        return _logits(model, batch, packed=packed)  # (n, V)
    finally:
        hook.remove()


@contextmanager
def without_virtual_tokens(model: Any) -> Iterator[None]:
    """Has the model compute as if nothing stood before its inputs, where an adapter put something there."""
    ahead = getattr(model, "active_peft_config", None)
    with model.disable_adapter() if ahead is not None and ahead.is_prompt_learning else nullcontext():
        yield


@torch.no_grad()
def example_losses(
    model: Any,
    examples: Examples,
    rows: Sequence[Row],
    *,
    packed: bool,
    size: int | None,
    device: torch.device,
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, number) of the learned tokens of each example that a row holds, both (n,) float64 over
    all examples; 0 for one that none holds. size: sequences that go through the model together. processes: that share
    the rows; all get the result.
    """
    sums, counts = torch.zeros(len(examples), dtype=torch.float64), torch.zeros(len(examples), dtype=torch.float64)
    for batch in _evaluated(model, processes.batches(examples, rows, size), device):
        each = learned_losses(model, batch, packed=packed).double().cpu()
        owners = batch.owners[batch.targets != UNSCORED].cpu()
        sums.index_add_(0, owners, each)
        counts.index_add_(0, owners, torch.ones_like(each))
    processes.sum(sums)
    processes.sum(counts)
    if not torch.isfinite(sums).all():
        raise NotFinite(
            "the held-out loss is NaN or infinite: the model is damaged, or the precision too narrow for it"
        )
    return sums, counts


@torch.no_grad()
def accuracy(
    model: Any,
    examples: Examples,
    rows: Sequence[Row],
    *,
    packed: bool,
    size: int | None,
    device: torch.device,
    processes: Processes = ALONE,
) -> float:
    """Share of the examples' learned tokens that the model finds likeliest; the arguments of `example_losses`."""
    right = count = 0
    for batch in _evaluated(model, processes.batches(examples, rows, size), device):
        told = learned_logits(model, batch, packed=packed).argmax(dim=-1)
        right += int((told == batch.targets[batch.targets != UNSCORED]).sum())
        count += len(told)
    right_of_all, all_of_them = processes.total(right, count)
    return right_of_all / all_of_them


def packs(model: Any, device: torch.device, vocabulary: int) -> bool:
    """Whether examples in one sequence stay strangers to each other in this model, found by trying.

    Two sequences whose first halves differ: the second half must give the same logits, and the same as alone, both but
    for rounding.
    """
    if "position_ids" not in inspect.signature(own(model).base_model.forward).parameters:
        return False
    dice = torch.Generator().manual_seed(0)
    first, second = 7, 9
    ids = torch.randint(0, vocabulary, (2, first + second), generator=dice)
    ids[1, first:] = ids[0, first:]
    positions = torch.cat([torch.arange(first), torch.arange(second)])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        both = [
            model(input_ids=one[None].to(device), position_ids=positions[None].to(device), use_cache=False).logits[0]
            for one in ids
        ]
        alone = model(input_ids=ids[:1, first:].to(device), use_cache=False).logits[0]
    model.train(was_training)
    inside, other = (one[first:].float() for one in both)
    spread = alone.float().std()
    leaked, apart = ((inside - one).square().mean().sqrt() / spread for one in (other, alone.float()))
    return bool(leaked <= LEAK_TOLERANCE.get(alone.dtype, 0.0) and apart <= POSITION_TOLERANCE.get(alone.dtype, 0.1))


def _evaluated(model: Any, batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device, while the model drops nothing."""
    was_training = model.training
    model.eval()
    for batch in batches:
        yield batch.to(device)
    model.train(was_training)


def _logits(model: Any, batch: Batch, *, packed: bool) -> Tensor:
    told = {"position_ids": batch.positions} if packed else {}
    return model(input_ids=batch.ids, use_cache=False, **told).logits  # type: ignore[no-any-return]
