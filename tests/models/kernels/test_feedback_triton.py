"""The Triton kernel rounds as torch's loop does: in Triton's interpreter, and on a GPU where there is one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.quantize import feedback
from tests.models.rounding_in_triton import CASES, problems, rounded, tied

ROOT = Path(__file__).parents[3]
NOISE = 1e-3  # of a step: what float32 may make of targets that are 255 steps away from zero
TIPPED = 0.02  # of all outputs: those in which a target lay on an edge, and what follows differs

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: torch's CUDA wheels bring it, its CPU wheel does not"
)


def processed(program: str, path: Path, **environment: str) -> Path:
    environment = os.environ | {"TRITON_CACHE_DIR": str(path.parent / "triton")} | environment
    subprocess.run([sys.executable, "-m", f"tests.models.{program}", path], cwd=ROOT, env=environment, check=True)
    return path


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("rounding") / "made.safetensors"
    return load_file(processed("rounding_in_triton", path, TRITON_INTERPRET="1"))


def part(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): each for key, each in found.items() if key.startswith(f"{name}/")}


def steps_off(made: dict[str, Tensor], top: int) -> Tensor:
    """(columns, out): how far each code is from what the errors of the columns before it ask for, in steps, in
    float64. At most ½ where it is the nearest.
    """
    W, G, codes = (made[name].double() for name in ("W", "G", "kernel.codes"))
    S, Z = (made[name].double()[made["groups"].long()] for name in ("kernel.S", "kernel.Z"))
    M = made["M"].double()[made["groups"].long()] if "M" in made else torch.zeros_like(W)
    errors = W - ((codes - Z) * S - M)
    targets = W + G.tril(-1).T @ errors
    return (((targets + M) / S + Z).clamp(0, top) - codes).abs()


def hold_together(made: dict[str, Tensor], top: int) -> None:
    codes, expected = made["kernel.codes"], made["loop.codes"]
    assert codes.min() >= 0 and codes.max() <= top and codes.unique().numel() > 2
    assert steps_off(made, top).max() <= 0.5 + NOISE
    same = (codes == expected).all(dim=0)  # (out,)
    assert (~same).sum() <= TIPPED * len(same)
    for name in ("S", "Z", "errors"):
        torch.testing.assert_close(made[f"kernel.{name}"][:, same], made[f"loop.{name}"][:, same], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gives_the_codes_scales_and_errors_of_torch_s_loop(interpreted, name):
    hold_together(part(interpreted, name), 2 ** CASES[name].bits - 1)


def test_a_weight_half_way_between_codes_gets_the_even_one_and_one_off_the_grid_its_end(interpreted):
    made = part(interpreted, "ties")
    assert torch.equal(made["kernel.codes"], (made["W"].round() + 8).clamp(0, 15))
    assert torch.equal(made["kernel.codes"], made["loop.codes"])
    assert torch.equal(made["kernel.errors"], made["loop.errors"])


def test_gptq_and_k_quants_give_with_the_kernel_what_they_give_without(interpreted):
    assert feedback._round_block_on(torch.device("cpu")) is None  # outside of the interpreter torch's loop rounds
    for name, expected in problems().items():
        same = (interpreted[name] == expected).flatten(1).all(dim=1)
        assert (~same).sum() <= TIPPED * len(same), name


def test_the_kernel_compiles_for_gpus_and_divides_exactly(tmp_path):
    compiled = json.loads(processed("compiling", tmp_path / "compiled.json", TRITON_INTERPRET="0").read_text())
    assert {name.split(",")[0] for name in compiled} == {"80", "90", "100"}
    for name, made in compiled.items():
        assert made["cubin_bytes"] > 0, name
        assert "div.rn.f32" in made["ptx"] and "div.full" not in made["ptx"], name
        assert ".local" not in made["ptx"], name  # errors stay in registers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_a_gpu_the_kernel_gives_the_codes_of_torch_s_loop():
    gpu = torch.device("cuda")
    for case in CASES.values():
        made = rounded(case, gpu)
        hold_together({name: each.cpu() for name, each in made.items()}, 2**case.bits - 1)
    ties = tied(gpu)
    assert torch.equal(ties["kernel.codes"], (ties["W"].round() + 8).clamp(0, 15))
