"""A whole job of any way to train, in a process of its own that kills itself, the hard way, after so many steps.

    python -m tests.models.train.killed_job WAY MODEL ROOM STEP

It saves a checkpoint at every step.
"""

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

from models.job import Inputs
from models.pipeline import run
from squeeze.specs.job_spec import JobSpec
from tests.models.train.killed import Suicidal
from tests.models.train.parts import inputs_for, kinds, spec_of

STEPS = 8
_FULL = {"method": "full", "learning_rate": 1e-3}
_DISTILL = {"kind": "distill", "student": {"layers": 1}, "learning_rate": 3e-3}
_ROUNDED = {"kind": "quantize", "method": "qat", "bits": 2, "steps": STEPS, "batch_size": 4, "learning_rate": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "adamw8bit": _FULL | {"optimizer": "adamw8bit"},
    "galore": _FULL | {"optimizer": "galore", "projection_rank": 8, "projection_refresh": 3},
    "badam": _FULL | {"optimizer": "badam", "block_steps": 2},
    "ema": _FULL | {"ema": 0.9, "evaluate_every": 3},
    "qlora nf4": {"method": "qlora", "rank": 4, "dropout": 0.1},
    "qlora int8": {"method": "qlora", "rank": 4, "base": "int8", "dropout": 0.1},
    "qlora gptq": {"method": "qlora", "rank": 4, "base": "gptq", "dropout": 0.1},
    "movement": {"kind": "prune", "method": "movement", "learning_rate": 1e-3, "evaluate_every": 3},
    "last_layers": {"method": "last_layers", "layers": 1, "evaluate_every": 3},
    "head": {"method": "head", "layers": 1},
    "prefix": {"method": "prefix", "virtual_tokens": 4},
    "logits": _DISTILL | {"method": "logits", "top_k": 8},
    "domains": _DISTILL | {"method": "logits", "top_k": 8, "domain_column": "kind", "evaluate_every": 3},
    "hidden": _DISTILL | {"method": "hidden"},
    "on_policy": _DISTILL | {"method": "on_policy", "new_tokens": 6},
    "factors": _FULL | {"kind": "finetune", "steps": STEPS, "batch_size": 4},
    "qat scales": _ROUNDED | {"train": "scales"},
    "qat weights": _ROUNDED | {"train": "weights"},
}


def asked(way: str) -> JobSpec:
    step = WAYS[way]
    if step.get("method") == "qat":
        sizes = {
            "data": {"source": "file-abcdefgh", "samples": 16, "sequence_length": 48},
            "evaluation": {"samples": 4},
        }
        return JobSpec.model_validate({"model": "org/model", "steps": [step], "formats": ["gptq"]} | sizes)
    if way == "factors":
        return spec_of(steps=[{"kind": "prune", "method": "svd", "params_target": 0.7}, step])
    return spec_of(step | {"steps": STEPS})


def inputs_of(way: str, model: Path, room: Path) -> Inputs:
    rows = [{"text": f"my day {n} was {('bad', 'fine', 'flat')[n % 3]} then", "label": n % 3} for n in range(60)]
    own = {"head": rows, "domains": kinds(), "factors": kinds()}
    inputs = inputs_for(asked(way), model, room, own.get(way))
    return dataclasses.replace(inputs, snapshot_seconds=0.0)


if __name__ == "__main__":
    run(inputs_of(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])), Suicidal(int(sys.argv[4]), signal.SIGKILL))
