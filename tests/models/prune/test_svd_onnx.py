"""ONNX Runtime multiplies by one factor after the other, and gives what the plain model gives."""

from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from models.files.checkpoint import open_model
from models.formats import layout
from models.formats.onnx import DATA, FILE
from models.progress import Silent
from models.weights.factored import Factored
from squeeze.shapes.architectures import HELD_BY
from squeeze.steps.factoring import SVD
from tests.models.formats.test_onnx import Running, thrown
from tests.models.prune.svd_parts import factored
from tests.models.rounding import dequantized
from tests.models.tiny import FAMILIES, KINDS

# What torch's exporter and onnxscript say of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STEP = SVD(method="svd", params_target=0.6, ignore=("*.o_proj",))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_file_is_smaller_and_gives_the_logits_of_the_plain_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = FAMILIES["llama"](tmp_path / "model", dtype=dtype, num_hidden_layers=1, tie_word_embeddings=True)
    made, told = factored(model, tmp_path / "work", STEP)
    out = tmp_path / "out"
    layout("onnx").write(open_model(model), made, out, Silent())
    running, ids = Running(out), thrown(3, 20)
    with torch.no_grad():
        expected = dequantized(model, made, torch.float32).eval()(ids).logits
    logits, cache = running(ids[:, :15], running.empty(3))
    rest, _ = running(ids[:, 15:], cache)
    exact = 1e-4 if dtype == torch.float32 else 0.1  # multiplied out, weights are rounded once more
    torch.testing.assert_close(torch.cat([logits, rest], dim=1), expected, rtol=exact, atol=exact)
    size = sum(site.rows * site.columns for site in made.sites.values()) * dtype.itemsize
    factors = sum(made.codes(name).tensors()["left"].nbytes for name in made.sites)
    factors += sum(
        made.codes(name).tensors()["right"].nbytes for name in {one.basis or "" for one in made.schemes.values()}
    )
    saved = (model / "model.safetensors").stat().st_size - (out / DATA).stat().st_size
    assert saved == pytest.approx(size - factors, abs=50_000) and saved > 0
    graph = ir.load(out / FILE).graph
    assert sum(name.removesuffix(".stored").endswith(".left") for name in graph.initializers) == len(made.sites)
    bases = {name.removesuffix(".stored") for name in graph.initializers if ".right" in name}
    assert bases == {f"{one.basis}.right" for one in made.schemes.values()}
    assert not any(module in made.sites for module in told.cuts if told.cuts[module].rank is None)
    for module in made.sites:
        back, ours = layout("onnx").read(out, module), made.codes(module)
        assert isinstance(back, Factored) and isinstance(ours, Factored)
        assert torch.equal(back.left, ours.left) and torch.equal(back.right, ours.right) and back.scheme == ours.scheme


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in KINDS if "onnx" in HELD_BY[family]])
def test_every_kind_of_model_is_held_as_factors(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family](tmp_path / "model")
    made, _ = factored(model, tmp_path / "work", SVD(method="svd", params_target=0.8))
    layout("onnx").write(open_model(model), made, tmp_path / "out", Silent())
    running, ids = Running(tmp_path / "out"), thrown(2, 20)
    with torch.no_grad():
        expected = dequantized(model, made, torch.float32).eval()(ids).logits
    logits, _ = running(ids, running.empty(2))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
