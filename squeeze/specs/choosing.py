"""What `"auto"` comes to in a step that finetunes: the rules, each with the reason that the report states; no torch.

Length: of the examples. Micro-batch: of the memory. Batch: tokens of a step, and enough steps. Learning rate: what was
best in published sweeps. docs/plan.md has them in words.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from squeeze.specs.job_spec import JobSpec
from squeeze.steps.finetuning import Finetune, Full, LastLayers, LowRank
from squeeze.steps.movement import Movement

LENGTH_SHARE, LENGTH_STEP = 0.95, 64
LENGTH_MOST = 131_072  # what a request may ask for
BATCH_TOKENS = 16_384  # 8 sequences of 2,048, what the defaults come to
LEAST_STEPS = 32  # that an epoch has
# The best of a grid in half decades, on tulu3, for models of 1 to 400 B (tinker_cookbook/hyperparam_utils.py `get_lr`,
# thinking-machines-lab/tinker-cookbook at 02face34): 1e-3 for most up to 4 B, 3e-4 for most from 8 B on.
LORA_RATES, LARGE_PARAMETERS = (1e-3, 3e-4), 6_000_000_000
LORA_FACTOR = 10  # LoRA's best over full training's: "LoRA Without Regret", Thinking Machines 2025
MEMORY_SHARE = 0.8  # of what is free that a plan may fill

Name = Literal["sequence_length", "batch_size", "micro_batch_size", "learning_rate"]


class Choice(BaseModel):
    """What `"auto"` came to."""

    model_config = ConfigDict(frozen=True)

    name: Name = Field(description="The field that said `auto`.")
    value: float
    why: str


def length_for(lengths: Sequence[int], most: int) -> Choice:
    """lengths: of the training examples, in tokens, whole or cut to `most`, which is the model's context."""
    ordered = sorted(lengths)
    held = ordered[ceil(LENGTH_SHARE * len(ordered)) - 1]
    value = min(most, LENGTH_STEP * ceil(held / LENGTH_STEP))
    return Choice(
        name="sequence_length",
        value=value,
        why=f"{LENGTH_SHARE:.0%} of the {len(ordered):,} training examples have at most {held} tokens (the longest "
        f"{ordered[-1]}), rounded up to a multiple of {LENGTH_STEP}; the model reads {most}",
    )


def batch_for(length: int, sequences: int | None, gpus: int = 1) -> Choice:
    """sequences: that an epoch has, all of `length` tokens; None: not known yet."""
    by_tokens = max(1, BATCH_TOKENS // length)
    by_data = by_tokens if sequences is None else max(1, sequences // LEAST_STEPS)
    value = max(1 << (min(by_tokens, by_data).bit_length() - 1), gpus)
    why = f"{BATCH_TOKENS:,} tokens a step at {length} a sequence"
    if by_data < by_tokens:
        why = f"{sequences} sequences are to make {LEAST_STEPS} steps an epoch"
    return Choice(name="batch_size", value=value, why=f"{why}; a power of two{', one a GPU at least' * (gpus > 1)}")


def rate_for(step: Finetune, parameters: int) -> Choice:
    """parameters: of the model."""
    lora = LORA_RATES[parameters >= LARGE_PARAMETERS]
    side = "from" if parameters >= LARGE_PARAMETERS else "below"
    size = f"for models {side} {LARGE_PARAMETERS / 1e9:.0f} B parameters"
    if isinstance(step, LowRank):
        why = f"{lora:g} was best for LoRA in published sweeps {size}, whatever its rank"
        return Choice(name="learning_rate", value=lora, why=why)
    if isinstance(step, Full | LastLayers | Movement):
        why = f"a {LORA_FACTOR}th of the {lora:g} that was best for LoRA in published sweeps {size}"
        return Choice(name="learning_rate", value=lora / LORA_FACTOR, why=why)
    usual = type(step).model_fields["learning_rate"].default
    why = f"the default of {step.method}: nothing better is known of one model than of another"
    return Choice(name="learning_rate", value=usual, why=why)


def micro_batch_for(batch: int, needed: Callable[[int], int], free_bytes: int) -> Choice:
    """The largest power of two, up to a batch, whose memory a share of the free one holds. needed: bytes beside what
    the process has already, of so many sequences together; monotonic.
    """
    value = 1 << (batch.bit_length() - 1)
    while value > 1 and needed(value) > MEMORY_SHARE * free_bytes:
        value //= 2
    return Choice(
        name="micro_batch_size",
        value=value,
        why=f"it needs {needed(value) / 2**30:.2f} GiB by the plan's formula, of {free_bytes / 2**30:.2f} GiB that are "
        f"free; {MEMORY_SHARE:.0%} may be filled",
    )


def settled(spec: JobSpec, step: Finetune, choices: Sequence[Choice]) -> tuple[JobSpec, Finetune]:
    """The job and its step with what was chosen in the place of `auto`; as they are where nothing was."""
    if not choices:
        return spec, step
    found = {choice.name: choice.value for choice in choices}
    length = found.pop("sequence_length", None)
    whole = {str(name): value if name == "learning_rate" else int(value) for name, value in found.items()}
    chosen = step.model_copy(update=whole)
    data = spec.data if length is None else spec.data.model_copy(update={"sequence_length": int(length)})
    steps = tuple(chosen if one is step else one for one in spec.steps)
    return spec.model_copy(update={"data": data, "steps": steps}), chosen


def supposed(spec: JobSpec, step: Finetune, parameters: int, positions: int) -> tuple[JobSpec, Finetune, list[Choice]]:
    """As `settled`, of what a plan can know: the learning rate. It supposes a usual length, as large a batch as the
    examples may allow, and that all of one goes through the model together. positions: of the model; 0: any number.
    """
    choices = [rate_for(step, parameters)] if step.learning_rate == "auto" else []
    length = min(spec.data.length, positions or spec.data.length)
    guesses = [Choice(name="sequence_length", value=length, why="")] if spec.data.sequence_length == "auto" else []
    batch = batch_for(length, None, max(1, spec.limits.gpus))
    if step.batch_size == "auto":
        guesses.append(batch)
    if step.micro_batch_size == "auto":
        size = batch.value if step.batch_size == "auto" else float(step.batch_size)
        guesses.append(Choice(name="micro_batch_size", value=size, why=""))
    return *settled(spec, step, [*choices, *guesses]), choices
