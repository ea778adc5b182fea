"""Rounded activations and caches: done as the library does them, and told from what they are done to."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from models.files.checkpoint import read_config
from models.formats import layout
from models.pipeline import check
from models.progress import Silent
from models.quantize import kv_cache
from models.streaming.activations import rounded, static_scale
from models.weights.float_codes import to_e4m3
from squeeze.errors import FormatUnfit
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.quantization import FP8, RTN, SmoothQuant
from tests.models.engine_parts import compressed, frame_of, thrown
from tests.models.job_parts import spec_of
from tests.models.tiny import FAMILIES, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_floats_of_eight_bits_round_a_token_s_activations_as_the_library_does() -> None:
    X = torch.randn(2, 5, 64) * torch.logspace(-2, 2, 5).view(1, 5, 1)
    args = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(X, args, torch.nn.Identity())

    torch.testing.assert_close(rounded(X, "float8"), fake_quantize(X, scale, zero, args), rtol=1e-6, atol=0)


def test_integers_of_eight_bits_err_by_half_a_step_of_each_token_s_own() -> None:
    X = torch.randn(3, 7, 64) * torch.logspace(-2, 2, 7).view(1, 7, 1)

    error = (rounded(X, "int8") - X).abs()

    assert (error <= X.abs().amax(dim=-1, keepdim=True) / 127 / 2 * 1.0001).all()


def test_a_static_scale_reaches_the_largest_magnitude_seen_and_beyond_it_saturates() -> None:
    scale = static_scale(torch.tensor([1.0, 7.0, 0.5]), torch.float32)

    assert float(scale) == pytest.approx(7 / 448)
    torch.testing.assert_close(
        rounded(torch.tensor([[7.0, -9.0]]), "float8-static", scale), torch.tensor([[7.0, -7.0]])
    )


def test_a_static_scale_is_stored_where_transformers_finds_it(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", num_hidden_layers=1)
    done, quality = compressed(model, tmp_path / "work", FP8(method="fp8", activations="static"))
    layout("compressed-tensors").write(frame_of(model).source, done.model, tmp_path / "out", Silent())

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert stored[f"{name}.input_scale"].shape == (1,)
    assert torch.equal(loaded.get_submodule(name).input_scale, stored[f"{name}.input_scale"])
    ids = thrown().ids
    with torch.no_grad():
        logits = loaded(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert float(loss.exp()) == pytest.approx(quality.perplexity_after, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_cache_scales_are_the_largest_rotated_key_and_value_of_the_result_over_448(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family](tmp_path / "model", num_hidden_layers=1)
    windows = thrown(2, 48)
    done, _ = compressed(model, tmp_path / "work", RTN(method="rtn", group_size=32, kv_cache="fp8"), windows)
    layout("compressed-tensors").write(frame_of(model).source, done.model, tmp_path / "out", Silent())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for name in done.model.sites:
            plain.get_submodule(name).weight.copy_(done.model.codes(name).dequantize(torch.float32))
        cache = plain(windows.ids, past_key_values=DynamicCache(), use_cache=True).past_key_values

    for leaf, states in ((kv_cache.KEY, cache.layers[0].keys), (kv_cache.VALUE, cache.layers[0].values)):
        (scale,) = (value for key, value in stored.items() if key.endswith(f"self_attn.{leaf}"))
        assert float(scale) == pytest.approx(float(states.abs().max()) / 448, rel=1e-5)
    assert read_config(tmp_path / "out")["quantization_config"]["kv_cache_scheme"]["type"] == "float"


def test_values_that_took_over_a_scale_are_cached_with_theirs(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", num_hidden_layers=1, num_key_value_heads=4)  # v_proj can take over o_proj's
    windows = thrown(2, 48)
    step = SmoothQuant(method="smoothquant", kv_cache="fp8")
    done, _ = compressed(model, tmp_path / "work", step, windows)
    layout("compressed-tensors").write(frame_of(model).source, done.model, tmp_path / "out", Silent())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    seen: list[torch.Tensor] = []
    loaded.get_submodule("model.layers.0.self_attn.v_proj").register_forward_hook(lambda *given: seen.append(given[2]))

    with torch.no_grad():
        loaded(windows.ids)

    largest = float(seen[0].abs().max())  # of values whose inputs were rounded too
    assert float(stored["model.layers.0.self_attn.v_scale"]) == pytest.approx(largest / 448, rel=0.05)


def test_evaluation_sees_the_cache_of_eight_bits_as_transformers_computes_it(tmp_path: Path) -> None:
    model, windows = FAMILIES["qwen3"](tmp_path / "model"), thrown()
    plain, without = compressed(model, tmp_path / "plain", RTN(method="rtn", group_size=32), windows)
    done, quality = compressed(model, tmp_path / "work", RTN(method="rtn", group_size=32, kv_cache="fp8"), windows)
    layout("compressed-tensors").write(frame_of(model).source, done.model, tmp_path / "out", Silent())

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = loaded(windows.ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows.ids[:, 1:].flatten())

    assert plain.model.sites == done.model.sites
    assert quality.perplexity_after != without.perplexity_after
    assert float(loss.exp()) == pytest.approx(quality.perplexity_after, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt"])
def test_a_cache_of_eight_bits_is_refused_before_any_work_where_consumers_find_no_attention(
    tmp_path: Path, family: str
) -> None:
    model = FAMILIES[family](tmp_path / "model")
    spec = spec_of({"method": "rtn", "kv_cache": "fp8"}, formats=["compressed-tensors"])

    with pytest.raises(FormatUnfit, match="consumers find no attention") as caught:
        check(spec, model)

    assert caught.value.param == "steps.0.kv_cache"


def test_formats_without_cache_scales_refuse_them_and_name_the_one_that_has_them() -> None:
    from squeeze.specs.formats import refuse_unfit

    spec: JobSpec = spec_of({"method": "rtn", "kv_cache": "fp8"}, formats=["gptq"])

    with pytest.raises(FormatUnfit, match=r"gptq can't hold scales of a key/value cache; compressed-tensors can"):
        refuse_unfit(spec.steps, spec.formats)


def test_eight_bit_floats_keep_their_precision_from_the_largest_down_to_their_normal_numbers() -> None:
    values = torch.logspace(-5, 8.8, 400, base=2.0)

    error = (to_e4m3(values).float() / values - 1).abs()

    assert float(error.max()) <= 2**-4
