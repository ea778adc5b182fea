"""One training before its first step: a model, what learns of it, examples, batches, and how they are computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from models.train.domains import Domains
from models.train.examples import Examples
from models.train.masks import UNMASKED, Masks
from models.train.optimizers import BESIDE
from models.train.packing import Plan, Row
from models.train.processes import ALONE, Processes
from models.train.scoring import Objective, accuracy, example_losses, learned_losses
from squeeze.steps.training import Train


@dataclass(frozen=True)
class Task:
    """model: on its device, with what is to learn in float32. held_out: empty where nobody looks at their loss.
    packed: rows hold several examples each. objective: what falls; the held-out loss is the negative log-likelihood
    whatever it is. domains: of which batches are made, where these are weighed. beside: learns too, and is worth
    nothing once the training is over. processes: that share the work. zeros: of learning parameters, by name, what
    of them stays zero. masks: of weights that are zero where the model computes, and learn.
    """

    model: Any
    step: Train
    examples: Examples
    plan: Plan
    held_out: Examples
    held_out_rows: Sequence[Row]
    packed: bool
    device: torch.device
    objective: Objective = learned_losses
    domains: Domains | None = None
    beside: nn.Module | None = None
    zeros: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Masks = UNMASKED
    processes: Processes = ALONE

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        own = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        more = {} if self.beside is None else {f"{BESIDE}{name}": one for name, one in self.beside.named_parameters()}
        return own | more

    def held_out_losses(self, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        """As `example_losses`."""
        with accelerator.autocast():
            return example_losses(self.model, self.held_out, self.held_out_rows, **self._how)

    def held_out_accuracy(self, accelerator: Accelerator) -> float:
        """As `accuracy`."""
        with accelerator.autocast():
            return accuracy(self.model, self.held_out, self.held_out_rows, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        return {
            "packed": self.packed,
            "size": self.step.together,
            "device": self.device,
            "processes": self.processes,
        }


def accelerator_of(precision: str, device: torch.device) -> Accelerator:
    """For one process on one device, alone or not. Its state is the process's: a job that trains twice sets it anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed, device_placement=False)
