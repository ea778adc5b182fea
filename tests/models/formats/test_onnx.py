"""ONNX Runtime computes what the codes stand for, in one go and token by token."""

import shutil
from pathlib import Path
from typing import Any

import numpy
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from models.certifying.certify import certify
from models.formats import layout
from models.formats.onnx import DATA, FILE
from models.progress import Silent
from models.streaming.frame import weightless
from models.weights.codes import Codes
from models.weights.quantized import QuantizedModel
from squeeze.errors import CertificationFailed
from squeeze.reports.report import Certificate
from squeeze.shapes.architectures import HELD_BY
from tests.models.engine_parts import thrown as thrown_windows
from tests.models.rounding import dequantized, rounded
from tests.models.tiny import FAMILIES, llama

# What torch's exporter and onnxscript say of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

IGNORED = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, QuantizedModel]:
    """A model in bfloat16, its head tied, one layer left as it is."""
    root = tmp_path_factory.mktemp("onnx")
    model = llama(root / "model", dtype=torch.bfloat16, num_hidden_layers=1, tie_word_embeddings=True)
    source, quantized = rounded(model, root / "codes", group_size=32, symmetric=False, ignored=(IGNORED,))
    layout("onnx").write(source, quantized, root / "out", Silent())
    return model, root / "out", quantized


class Running:
    def __init__(self, out: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(out / FILE), providers=["CPUExecutionProvider"])
        self.inputs = {one.name: one.shape for one in self.session.get_inputs()}
        self.outputs = [one.name for one in self.session.get_outputs()]

    def empty(self, batch: int) -> dict[str, Any]:
        return {
            name: numpy.zeros((batch, shape[1], 0, shape[3]), numpy.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def __call__(self, ids: torch.Tensor, past: dict[str, Any], mask: torch.Tensor | None = None) -> Any:
        seen = next(iter(past.values())).shape[2]
        mask = torch.ones(len(ids), seen + ids.shape[1], dtype=torch.int64) if mask is None else mask
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, seen:]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        made = self.session.run(
            self.outputs, {name: one.numpy() for name, one in given.items() if name in self.inputs} | past
        )
        found = dict(zip(self.outputs, made, strict=True))
        cache = {name: found[name.replace("past_key_values", "present")] for name in past}
        return torch.tensor(found["logits"]), cache


def thrown(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(batch))


def whole(model: Path, quantized: QuantizedModel) -> Any:
    return dequantized(model, quantized, torch.float32).eval()


def test_one_pass_gives_the_logits_of_the_dequantized_weights(written: tuple[Path, Path, QuantizedModel]) -> None:
    model, out, quantized = written
    running, plain, ids = Running(out), whole(model, quantized), thrown(3, 20)
    with torch.no_grad():
        expected = plain(ids).logits
    logits, _ = running(ids, running.empty(3))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_tokens_one_by_one_give_what_they_give_together(written: tuple[Path, Path, QuantizedModel]) -> None:
    running, ids = Running(written[1]), thrown(1, 12)
    together, _ = running(ids, running.empty(1))
    cache = running.empty(1)
    for place in range(12):
        logits, cache = running(ids[:, place : place + 1], cache)
        torch.testing.assert_close(logits[:, 0], together[:, place], rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_is_not_seen(written: tuple[Path, Path, QuantizedModel]) -> None:
    running, ids = Running(written[1]), thrown(2, 10)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, :4] = 0
    logits, _ = running(ids, running.empty(2), mask)
    alone, _ = running(ids[1:, 4:], running.empty(1))
    torch.testing.assert_close(logits[1:, 4:], alone, rtol=1e-4, atol=1e-4)


def test_codes_come_back_as_they_were(written: tuple[Path, Path, QuantizedModel]) -> None:
    _, out, quantized = written
    for module in quantized.sites:
        back, ours = layout("onnx").read(out, module), quantized.codes(module)
        assert isinstance(back, Codes)
        assert back.scheme == ours.scheme
        assert all(torch.equal(back.tensors()[part], tensor) for part, tensor in ours.tensors().items())


def test_what_is_not_quantized_stands_once_and_in_the_source_s_type(
    written: tuple[Path, Path, QuantizedModel],
) -> None:
    model, out, _ = written
    graph = ir.load(out / FILE).graph
    names = {name.removesuffix(".stored"): value for name, value in graph.initializers.items()}
    parameters = {name for name, _ in weightless(model, torch.float32).named_parameters()}
    assert "lm_head.weight" not in names  # tied
    assert names["model.embed_tokens.weight"].dtype == ir.DataType.BFLOAT16
    assert names[f"{IGNORED}.weight"].dtype == ir.DataType.BFLOAT16
    assert {name for name in names if name.endswith("norm.weight")} <= parameters
    assert (out / DATA).stat().st_size < (model / "model.safetensors").stat().st_size
    assert str(model) not in (out / FILE).read_bytes().decode("latin-1")
    assert b"onnx_graph.py" not in (out / FILE).read_bytes()


def test_onnx_runtime_certifies_what_was_measured_and_nothing_else(
    written: tuple[Path, Path, QuantizedModel], tmp_path: Path
) -> None:
    model, out, quantized = written
    windows = thrown_windows(count=2, length=48)
    with torch.no_grad():
        logits = whole(model, quantized)(windows.ids).logits[:, :-1]
    expected = [
        float(torch.nn.functional.cross_entropy(row, ids[1:])) for row, ids in zip(logits, windows.ids, strict=True)
    ]

    def certified(directory: Path) -> Certificate:
        (only,) = certify(
            directory,
            "onnx",
            expected=expected,
            windows=windows,
            source_bytes=10**9,
            dtype=torch.float32,
            device="cpu",
            consumers={},
            notify=Silent(),
        )
        return only

    certificate = certified(out)
    assert (certificate.consumer, certificate.outcome) == ("onnxruntime", "passed")
    assert certificate.perplexity == pytest.approx(certificate.expected_perplexity, rel=1e-4)
    assert certificate.sample
    damaged = shutil.copytree(out, tmp_path / "damaged")
    (damaged / DATA).write_bytes((out / DATA).read_bytes()[::-1])
    with pytest.raises(CertificationFailed, match="onnxruntime on the onnx result"):
        certified(damaged)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [(8, "channel", True), (8, 32, False), (4, "channel", False), (4, 64, True)], ids=str
)
@pytest.mark.parametrize("family", [family for family, formats in HELD_BY.items() if "onnx" in formats])
def test_every_family_computes_the_logits_of_its_dequantized_weights(
    tmp_path: Path, family: str, recipe: tuple[int, Any, bool]
) -> None:
    bits, group_size, symmetric = recipe
    model = FAMILIES[family](tmp_path / "model")
    source, quantized = rounded(model, tmp_path / "codes", bits=bits, group_size=group_size, symmetric=symmetric)
    layout("onnx").write(source, quantized, tmp_path / "out", Silent())
    running, ids = Running(tmp_path / "out"), thrown(2, 20)
    with torch.no_grad():
        expected = whole(model, quantized)(ids).logits
    logits, cache = running(ids[:, :15], running.empty(2))
    rest, _ = running(ids[:, 15:], cache)
    torch.testing.assert_close(torch.cat([logits, rest], dim=1), expected, rtol=1e-3, atol=1e-3)
    for module in quantized.sites:
        back, ours = layout("onnx").read(tmp_path / "out", module), quantized.codes(module)
        assert back.scheme == ours.scheme
        assert all(torch.equal(back.tensors()[part], tensor) for part, tensor in ours.tensors().items())
