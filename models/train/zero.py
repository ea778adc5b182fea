"""DeepSpeed's ZeRO (arXiv 1910.02054): processes that share a training hold optimizer state (stage 1), gradients (2)
and weights (3) in parts.

Its engine is called directly, with our AdamW, loss and batches. Not through accelerate, which makes an engine only
where its own launcher set the environment. Without the collective operation that DeepSpeed would compile for CPUs: its
peers wait in shared memory for one that was killed, where gloo says that it is gone.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.resources import map_large_memory, return_free_memory
from models.streaming.team import Team
from models.train.optimizers import optimizer_of
from squeeze.steps.sharding import ZERO_STAGES, Way
from squeeze.steps.training import Train

BUCKET = 2**23  # numbers that are sent at once, and that the buffers for it hold
MOMENTS = ("exp_avg", "exp_avg_sq")
COMPILED = "deepspeed_shm_comm"  # the collective operation, as DeepSpeed calls it


@dataclass(frozen=True)
class Part:
    """What one process holds of a tensor. held: its numbers from `start` on, flat."""

    held: Tensor
    start: int
    shape: torch.Size
    team: Team

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    def detach(self) -> "Part":
        return self

    def whole(self) -> Tensor:
        """The tensor; all processes have to ask."""
        entire = self.held.new_zeros(self.shape.numel())
        self.of(entire).copy_(self.held)
        self.team.sum(entire)  # exact: everybody else's is 0
        return entire.view(self.shape)

    def of(self, whole: Tensor) -> Tensor:
        """This part of another tensor of that shape."""
        return whole.reshape(-1)[self.start : self.start + len(self.held)]

    def holding(self, held: Tensor) -> "Part":
        """The same part of another tensor."""
        return Part(held, self.start, self.shape, self.team)


class Zero:
    """A model that DeepSpeed has taken over, with the optimizer of what learns; one of which nothing learns can be
    called, in stage 3.

    module: the model itself. blocks: of it; as with FSDP2, so many weights are whole as two of them have.
    """

    def __init__(
        self, team: Team, way: Way, model: Any, blocks: Sequence[nn.Module], step: Train, precision: str
    ) -> None:
        self.module, self._team, self._stage = model, team, ZERO_STAGES[way]
        self._learning = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._optimizer = optimizer_of(step, self._learning) if self._learning else None
        self._environment = {"DS_ACCELERATOR": team.device.type, "LOCAL_RANK": str(team.device.index or 0)}
        self._environment = {name: one for name, one in self._environment.items() if name not in os.environ}
        os.environ.update(self._environment)
        import deepspeed  # which takes seconds to import, and need not be there

        if team.device.type == "cpu":
            deepspeed.ops.__compatible_ops__[COMPILED] = False
        self._linear = functional.linear
        largest = max((sum(one.numel() for one in block.parameters()) for block in blocks), default=0)
        settings = _settings(self._stage, step, precision, 2 * largest)
        if self._stage == 3:  # before the engine would put the whole model on the device
            map_large_memory()  # weights come and go: on the CPU a training took twice of what it held
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            return_free_memory()
        self._engine, self._zero, _, _ = deepspeed.initialize(model=model, optimizer=self._optimizer, config=settings)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._engine(*inputs, **named)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Whose learning rate holds; its parameters and its state are flat."""
        assert self._optimizer is not None, "something learns"
        return self._optimizer

    def adding_up(self, *, last: bool) -> None:
        """Before a part of a batch. last: of this batch."""
        self._engine.set_gradient_accumulation_boundary(last)

    def norm(self) -> float:
        """Of the gradient, before it is clipped; after the last part of a batch. NaN where it is no number."""
        if self._stage < 3:
            norm = float(self._zero.scaled_global_norm())
            return norm if norm >= 0 else math.nan  # as DeepSpeed says it
        from deepspeed.utils import safe_get_local_grad

        square = sum(safe_get_local_grad(one).double().square().sum().cpu() for one in self._learning.values())
        total = torch.as_tensor(square).reshape(1)
        self._team.sum(total)
        return float(total.sqrt())

    def step(self) -> None:
        """The optimizer's, of the gradient clipped as `step` has it."""
        self._engine.step()

    @property
    def held(self) -> dict[str, Tensor]:
        """What this process holds of what learns: whole weights, in stage 3 a part of each."""
        if self._stage < 3:
            return dict(self._learning)
        return {name: self._part(one).held for name, one in self._learning.items()}

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, "Tensor | Part"]:
        """What was made of `held`, by its names behind a point, as a checkpoint takes it."""
        if self._stage < 3:
            return dict(tensors)
        return {name: self._part(self._learning[name.partition(".")[2]]).holding(one) for name, one in tensors.items()}

    def spread(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The other way round: of whole tensors those of a weight as this process holds it."""
        if self._stage < 3:
            return dict(tensors)
        found = dict(tensors)
        for name, tensor in tensors.items():
            one = self._learning.get(name.partition(".")[2])
            if one is not None:
                found[name] = self._part(one).of(tensor).to(self._team.device, copy=True)
        return found

    def optimizer_parts(self) -> dict[str, "Tensor | Part"]:
        """As `optimizers.optimizer_tensors` has it for a process alone."""
        found: dict[str, Tensor | Part] = {}
        for n, one in enumerate(self._learning.values()):
            flat, at, part = self._master(one)
            state = self.optimizer.state.get(flat, {})
            for name, value in state.items():
                key = f"optimizer.{n}.{name}"
                found[key] = part.holding(value[at : at + len(part.held)]) if name in MOMENTS else value
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Has the optimizer go on with weights that were set, and with the state that `optimizer_parts` gave."""
        self._zero.refresh_fp32_params()
        for n, one in enumerate(self._learning.values()):
            if f"optimizer.{n}.step" not in tensors:
                continue
            flat, at, part = self._master(one)
            state = self.optimizer.state[flat]
            state["step"] = tensors[f"optimizer.{n}.step"].clone()
            for name in MOMENTS:
                moment = state.setdefault(name, torch.zeros_like(flat, requires_grad=False))
                moment[at : at + len(part.held)].copy_(part.of(tensors[f"optimizer.{n}.{name}"]))

    @contextmanager
    def whole(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """A weight; all processes have to ask."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.detach()

    def end(self) -> None:
        """Lets the model go, which in stage 3 can't be called any more; gives back torch's linear; and takes from the
        environment what DeepSpeed asked for, since accelerate would take it for a launcher's.
        """
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self._engine.destroy()
        functional.linear = self._linear
        FWD_MODULE_STACK.clear()  # at whose bottom each model stays that was called in stage 3
        for name in self._environment:
            del os.environ[name]

    def _part(self, parameter: Any) -> Part:
        """Of the weight as the model has it; stage 3."""
        size, start = parameter.ds_tensor.ds_numel, self._team.rank * parameter.ds_tensor.ds_numel
        count = max(0, min(size, parameter.ds_numel - start))
        return Part(parameter.ds_tensor.data[:count], start, parameter.ds_shape, self._team)

    def _master(self, parameter: Any) -> tuple[Tensor, int, Part]:
        """(what the optimizer has as one parameter, where in it the part of a weight begins, this part)."""
        if self._stage == 3:
            number, at, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            return self._zero.fp32_partitioned_groups_flat[number], at, self._part(parameter)
        flat, mapping = self._zero.single_partition_of_fp32_groups[0], parameter._hp_mapping
        if mapping is None:  # it lies in those of other processes
            return flat, 0, Part(flat.detach()[:0], 0, parameter.shape, self._team)
        at, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
        return flat, at, Part(mapping.hp_fragment.detach(), start, parameter.shape, self._team)


def numel(parameter: nn.Parameter) -> int:
    """Of a whole weight, of which this process may hold a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _settings(stage: int, step: Train, precision: str, live: int) -> dict[str, Any]:
    """live: numbers of weights that are whole at the same time."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # it must say something, and does nothing: batches are ours
        "gradient_clipping": step.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Weights that learn stay float32, and so does what is sent of them: no module is named.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            # What is fetched ahead of its layer is let go again while it is on its way, as few weights stay: it fails.
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": live,  # else a model of less than a billion weights stays whole
            "stage3_param_persistence_threshold": 0,  # what stayed whole would not see a part that we set
            "stage3_max_reuse_distance": 0,  # for the same reason
            "memory_efficient_linear": True,  # instead of torch's, which keeps each whole weight for its backward pass
        },
    }
