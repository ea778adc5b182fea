"""A process that rounds on the CPU with the Triton kernel, in Triton's interpreter, and with torch's loop.

    TRITON_INTERPRET=1 python -m tests.models.rounding_in_triton <file.safetensors>

A process of its own, since Triton reads how it is to run when it is imported.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.ggml.blocks import scheme_of
from models.quantize import feedback, gptq, kquant
from models.quantize.feedback import Levels, factorised
from models.quantize.grid import fit
from models.quantize.problem import Problem
from models.streaming.statistics import Factor, Statistics
from squeeze.steps.quantization import GPTQ, KQuant

TIES = 16  # columns


@dataclass(frozen=True)
class Case:
    """A weight (out, columns). grid: "fitted" before the first column, "refitted" group by group, "shifted" as
    llama.cpp's are, with steps of either sign.
    """

    out: int
    columns: int
    group_size: int
    bits: int
    symmetric: bool
    by_activation: bool
    dtype: torch.dtype
    grid: Literal["fitted", "refitted", "shifted"]


CASES = {
    "groups of one block": Case(30, 96, 32, 4, True, False, torch.float32, "refitted"),
    "groups of two blocks": Case(33, 128, 64, 3, False, False, torch.bfloat16, "refitted"),
    "one group": Case(7, 64, 64, 2, True, False, torch.float32, "fitted"),
    "mixed groups": Case(70, 64, 32, 4, False, True, torch.bfloat16, "fitted"),
    "mixed groups of 8 bits": Case(32, 64, 32, 8, True, True, torch.float32, "fitted"),
    "mixed groups of 2 bits": Case(20, 128, 64, 2, False, True, torch.float32, "fitted"),
    "a shift": Case(37, 64, 16, 4, False, True, torch.bfloat16, "shifted"),
    "a short block": Case(1, 76, 19, 3, True, True, torch.float32, "fitted"),
}


def inputs(columns: int, seed: int) -> Tensor:
    """(512, columns), correlated, of differing sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.rand(columns, generator=generator).mul(3).exp()
    return torch.randn(512, columns, generator=generator) @ mixing * sizes


def statistics_of(X: Tensor, device: torch.device) -> Statistics:
    statistics = Statistics({"hessian"}, X.shape[1], device)
    statistics.add(X.to(device))
    return statistics


def weights(out: int, columns: int, seed: int) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def rounded(case: Case, device: torch.device) -> dict[str, Tensor]:
    """What the kernel and torch's loop make of it, with what they were given."""
    hessian = statistics_of(inputs(case.columns, seed=case.out), device).hessian
    assert hessian is not None
    factor = factorised(hessian, 0.01, by_activation=case.by_activation)
    W = weights(case.out, case.columns, seed=case.columns).to(device)
    generator = torch.Generator().manual_seed(case.bits)

    def fitted(part: Tensor) -> tuple[Tensor, Tensor]:
        return fit(part.view(len(part), -1, case.group_size), case.bits, case.symmetric, case.dtype, None)

    def refit(targets: Tensor, _: int) -> tuple[Tensor, Tensor]:
        scale, zero = fitted(targets)
        return scale[:, 0], zero[:, 0]

    scale, zero = fitted(W)
    shift = None
    if case.grid == "shifted":
        shift = torch.rand(scale.shape, generator=generator).mul(0.1).to(device)
        scale = scale * torch.randn(scale.shape, generator=generator).sign().to(device)
        zero = torch.full_like(scale, 2.0)
    levels = Levels(scale, zero, shift, 2**case.bits - 1)
    return both(W, factor, levels, refit if case.grid == "refitted" else None)


def tied(device: torch.device) -> dict[str, Tensor]:
    """Weights half way between two codes, far off the grid, and on it, with nothing that a column puts on others."""
    W = (torch.arange(-16, 16.0) / 2).repeat(TIES, 1).T.contiguous().to(device)
    W[:, -1] *= 1e30
    layout = torch.arange(TIES, device=device).flip(0)
    ones = torch.ones(TIES, device=device)
    factor = Factor(torch.eye(TIES, device=device), ones, layout, ones, ones, 0.01, 0)
    scale, zero = torch.ones(len(W), 1, device=device), torch.full((len(W), 1), 8.0, device=device)
    return both(W, factor, Levels(scale, zero, None, 15), None)


def both(W: Tensor, factor: Factor, levels: Levels, refit: feedback.Refit | None) -> dict[str, Tensor]:
    found = {"W": W[:, factor.layout].T.contiguous(), "G": factor.G.contiguous()}
    for name in ("kernel", "loop"):
        band = feedback._Band.of(W, factor, levels, slice(0, len(W)), torch.float32, None)
        assert band.round_block is not None, "Triton would not round here"
        if name == "loop":
            band = replace(band, round_block=None)
        band.round(0, W.shape[1], refit)
        found |= {
            f"{name}.codes": band.targets,
            f"{name}.errors": band.errors,
            f"{name}.S": band.S,
            f"{name}.Z": band.Z,
        }
        if band.M is not None:
            found["M"] = band.M
        found["groups"] = band.groups
    return found


def problems() -> dict[str, Tensor]:
    """Codes and scales of whole problems, by whatever rounds columns here."""
    found: dict[str, Tensor] = {}
    cpu = torch.device("cpu")
    for order in (True, False):
        step = GPTQ(method="gptq", bits=3, group_size=32, activation_order=order)
        problem = Problem(weights(24, 96, seed=1), statistics_of(inputs(96, seed=2), cpu), step.scheme(), torch.float32)
        made = gptq.quantize(problem, step).encoded
        found |= {f"gptq.{order}.codes": made.codes, f"gptq.{order}.scale": made.scale}
    statistics = statistics_of(inputs(256, seed=3), cpu)
    problem = Problem(weights(8, 256, seed=4), statistics, scheme_of("q4_k"), torch.float32)
    made = kquant.quantize(problem, KQuant(method="kquant")).encoded
    return found | {"kquant": made.dequantize(torch.float32)}


def run(path: Path) -> None:
    found = problems()
    cpu = torch.device("cpu")
    for name, made in [("ties", tied(cpu)), *((name, rounded(case, cpu)) for name, case in CASES.items())]:
        found |= {f"{name}/{part}": tensor.contiguous() for part, tensor in made.items()}
    save_file({name: tensor.clone() for name, tensor in found.items()}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
