"""K-quants through the method: error feedback lowers what the layer's outputs err by, on the grid that was fitted."""

from pathlib import Path

import gguf
import pytest
import torch

from models.files.checkpoint import open_model
from models.formats import gguf as layout
from models.ggml.blocks import scheme_of, to_blocks
from models.ggml.types import Name
from models.progress import Silent
from models.quantize.kquant import quantize
from models.quantize.problem import Problem
from models.streaming.statistics import Statistics
from squeeze.errors import FormatUnfit
from squeeze.steps.quantization import KQuant
from tests.models.engine_parts import compressed, thrown
from tests.models.tiny import FAMILIES

STEP = KQuant(method="kquant")


def correlated(columns: int = 256, count: int = 1024) -> torch.Tensor:
    """Inputs of which a few directions have most of the energy, as activations have."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns // 8, columns, generator=generator)
    spread = torch.randn(count, columns, generator=generator) * 0.3
    return torch.randn(count, columns // 8, generator=generator) @ mix + spread


def statistics_of(X: torch.Tensor) -> Statistics:
    statistics = Statistics({"hessian"}, X.shape[1], torch.device("cpu"))
    statistics.add(X)
    return statistics


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q5_0", "q5_1"])
def test_feedback_lowers_the_error_of_the_outputs(name: Name) -> None:
    X, W = correlated(), torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    statistics = statistics_of(X)

    made = quantize(Problem(W.clone(), statistics, scheme_of(name), torch.float32), STEP).encoded

    nearest = to_blocks(W, name, X.square().mean(dim=0))
    assert made.scheme == scheme_of(name)
    with_feedback = statistics.error_of(made.dequantize(torch.float32) - W, W)
    assert with_feedback < 0.8 * statistics.error_of(nearest.dequantize(torch.float32) - W, W)


def test_a_linear_that_no_token_reached_is_rounded_to_nearest() -> None:
    W = torch.randn(4, 256, generator=torch.Generator().manual_seed(5))

    made = quantize(Problem(W.clone(), statistics_of(torch.zeros(8, 256)), scheme_of("q4_k"), torch.float32), STEP)

    assert made.damping is None
    assert float((made.encoded.dequantize(torch.float32) - W).square().mean() / W.square().mean()) < 0.01


def test_a_mixture_goes_through_the_engine_into_the_file(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "m", hidden_size=256, intermediate_size=512)

    done, quality = compressed(model, tmp_path / "w", KQuant(method="kquant", mixture="q2_k"), thrown())
    layout.write(open_model(model), done.model, tmp_path / "out", Silent())

    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q2_K"
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.0.attn_v.weight"] == "Q3_K"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert quality.divergence_nats is not None
    for name in done.model.sites:
        assert torch.equal(
            layout.read(tmp_path / "out", name).dequantize(torch.float32),
            done.model.codes(name).dequantize(torch.float32),
        )


def test_experts_are_stacked_in_the_file(tmp_path: Path) -> None:
    model = FAMILIES["mixtral"](tmp_path / "m")

    done, _ = compressed(model, tmp_path / "w", STEP, thrown())
    layout.write(open_model(model), done.model, tmp_path / "out", Silent())

    tensors = {one.name: one for one in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert tensors["blk.1.ffn_up_exps.weight"].shape.tolist() == [128, 256, 4]
    assert tensors["blk.1.ffn_up_exps.weight"].tensor_type.name == "Q5_0"  # 128 inputs fill no super-block


def test_a_family_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    model = FAMILIES["opt"](tmp_path / "m")

    with pytest.raises(FormatUnfit, match="gguf is written for"):
        compressed(model, tmp_path / "w", STEP, thrown())
