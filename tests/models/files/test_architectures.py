"""Every family of the table: its blocks run alone as in the whole model, and its result is what was measured."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from models.files.checkpoint import open_model
from models.formats import layout
from models.pipeline import check, run
from models.progress import Silent
from models.streaming.experts import Experts
from models.streaming.frame import Frame
from squeeze.errors import FormatUnfit
from squeeze.names import Format
from squeeze.shapes.architectures import HELD_BY
from tests.models.engine_parts import CPU, frame_of, thrown
from tests.models.job_parts import inputs_of, spec_of
from tests.models.rounding import place
from tests.models.tiny import FAMILIES, HEADS, HIDDEN, MIXTURES

# Settings of a family that make other blocks of it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon of 7B": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    "falcon-rw": (
        "falcon",
        {
            "new_decoder_architecture": False,
            "num_kv_heads": HEADS,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "stablelm 2": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "deepseek v2 lite": ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy"}),
    "command r+": ("cohere", {"use_qk_norm": True}),
    "a mixture with dense blocks": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "a mixture with a shared expert": ("qwen2_moe", {"norm_topk_prob": True}),
    "bfloat16": ("deepseek_v3", {"dtype": torch.bfloat16}),
    "fused mixtral": ("mixtral", {"fused": True}),
    "fused deepseek": ("deepseek_v3", {"fused": True}),
}
CASES = {family: (family, cast("dict[str, Any]", {})) for family in FAMILIES} | VARIANTS

# Those in which writing or loading differs in kind; loading takes a process of its own, hence seconds.
CERTIFIED_QUICKLY = {(family, "compressed-tensors") for family in ("deepseek_v3", "falcon", "gemma2")}


def through_blocks(frame: Frame, ids: Tensor) -> Tensor:
    """Logits, the blocks loaded one at a time."""
    with torch.no_grad():
        with frame.surroundings():
            hidden, calls = frame.enter(ids)
        for index, (args, kwargs) in enumerate(calls):
            with frame.block(index) as block:
                output = block(hidden, *args, **kwargs)
                hidden = output[0] if isinstance(output, tuple) else output
        with frame.surroundings():
            return frame.leave(hidden, ids)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model.eval()(ids).logits)


@pytest.mark.parametrize("case", CASES)
def test_block_by_block_the_logits_are_those_of_the_whole_model(tmp_path: Path, case: str) -> None:
    family, changes = CASES[case]
    frame = frame_of(FAMILIES[family](tmp_path / "model", **changes))
    frame.refuse_misfits()
    ids = thrown(2, 48).ids

    found = through_blocks(frame, ids)

    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), ids)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 if found.dtype == torch.float32 else 2e-2)
    with frame.surroundings():  # without its blocks the model says something else: they were not skipped
        bare = frame.leave(frame.enter(ids)[0], ids)
    assert (bare - expected).abs().mean() > 0.1 * expected.std()


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(
            family, name, marks=[] if (family, name) in CERTIFIED_QUICKLY else [pytest.mark.slow], id=f"{family}-{name}"
        )
        for family in FAMILIES
        for name in HELD_BY[family]
        if name in ("compressed-tensors", "gptq")
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_family_is_quantized_and_certified_and_computes_what_its_codes_say(
    tmp_path: Path, family: str, name: Format
) -> None:
    model = FAMILIES[family](tmp_path / "model")
    spec = spec_of({"method": "rtn"}, formats=[name])
    outcome = run(inputs_of(spec, model, None, tmp_path), Silent())

    assert [one.outcome for one in outcome.report.certificates if one.consumer == "transformers"] == ["passed"]
    out = outcome.directories[name]
    frame, ids = frame_of(model), thrown(2, 48).ids
    plain = AutoModelForCausalLM.from_pretrained(model)
    unrounded = logits_of(plain, ids)
    for site in (site for n in range(frame.count) for site in frame.sites(n)):
        place(plain, site, layout(name).read(out, site.name).dequantize(torch.float32))
    loaded, expected = logits_of(AutoModelForCausalLM.from_pretrained(out), ids), logits_of(plain, ids)
    apart = (loaded - expected).square().mean().sqrt()
    rounding = (unrounded - expected).square().mean().sqrt()
    # gptqmodel's kernels round sums to bfloat16
    assert apart <= (1e-5 if name == "compressed-tensors" else 0.2) * rounding
    assert rounding > 0.01 * expected.std()


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_linears_one_by_one_and_routers_are_none(tmp_path: Path, family: str) -> None:
    frame = frame_of(FAMILIES[family](tmp_path / "model"))
    sites = {site.name: site for site in frame.sites(1)}
    experts = frame.experts(1)
    assert len(experts) == (4 if family == "mixtral" else 8)
    for name, (gate, up, down) in experts.items():
        assert sites[gate].columns == sites[up].columns == sites[down].rows == HIDDEN
        assert {gate, up, down} == {site for site in sites if site.startswith(f"{name}.")}
    routers = [name for name in frame.source.names() if "gate.weight" in name]
    assert routers
    assert not [name for name in routers if name.removesuffix(".weight") in sites]


def test_a_dense_block_has_no_experts(tmp_path: Path) -> None:
    assert frame_of(FAMILIES["llama"](tmp_path / "model")).experts(0) == {}
    assert frame_of(FAMILIES["deepseek_v3"](tmp_path / "latent")).experts(0) == {}


def test_sites_have_the_names_of_the_files(tmp_path: Path) -> None:
    frame = frame_of(FAMILIES["mixtral"](tmp_path / "model"))
    stored = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in stored
    assert {f"{site.name}.weight" for n in range(2) for site in frame.sites(n)} <= stored


@pytest.mark.parametrize("family", MIXTURES)
def test_fused_experts_in_files_are_read_one_by_one(tmp_path: Path, family: str) -> None:
    apart = open_model(FAMILIES[family](tmp_path / "apart"))
    fused = open_model(FAMILIES[family](tmp_path / "fused", fused=True))
    kept = set(load_file(tmp_path / "fused" / "model.safetensors"))
    assert any(name.endswith("experts.gate_up_proj") for name in kept)
    for name in apart.names():
        key = fused.file_key(name.replace("block_sparse_moe.gate", "mlp.gate"))
        assert key is not None, name
        assert torch.equal(fused.tensor(key), apart.tensor(name)), name
    assert fused.parameters == apart.parameters


def test_a_fused_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    model = FAMILIES["mixtral"](tmp_path / "model", fused=True)
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.experts.down_proj"] = state["model.layers.1.mlp.experts.down_proj"][:3].clone()
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.1\..*experts\.3\.w2"):
        frame_of(model).refuse_misfits()


def test_every_expert_is_called_in_the_same_order_whatever_the_routing(tmp_path: Path) -> None:
    """Passes in lock step halt at each linear. One expert gets no token, the others differ from batch to batch."""
    model = FAMILIES["deepseek_v3"](tmp_path / "model", n_group=1, topk_group=1)
    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.gate.e_score_correction_bias"][5] = -1e9
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    frame = frame_of(model)
    experts = frame.experts(1)
    seen: list[list[tuple[str, int]]] = []
    with frame.surroundings(), torch.no_grad():
        entered = [frame.enter(row[None]) for row in thrown(3, 4).ids]
    with frame.block(1) as block, torch.no_grad():
        for site in frame.sites(1):
            frame.module(site).register_forward_pre_hook(
                lambda _, inputs, name=site.name: seen[-1].append((name, inputs[0].numel() // inputs[0].shape[-1]))
            )
        for hidden, calls in entered:
            seen.append([])
            block(hidden, *calls[1][0], **calls[1][1])

    assert len({tuple(name for name, _ in batch) for batch in seen}) == 1
    assert {name for name, _ in seen[0]} == {site.name for site in frame.sites(1)}
    routed = [[dict(batch)[gate] for gate, _, _ in experts.values()] for batch in seen]
    assert [counts[5] for counts in routed] == [0, 0, 0]
    assert len({tuple(counts) for counts in routed}) == 3
    assert [sum(counts) for counts in routed] == [8, 8, 8]  # four tokens, two experts each


def test_experts_compute_what_transformers_do(tmp_path: Path) -> None:
    """On routing of any kind, the same expert chosen for everybody included, and on no token at all."""
    model = FAMILIES["qwen3_moe"](tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(model).model.layers[0].mlp.experts
    frame = frame_of(model)
    with frame.block(0) as block, torch.no_grad():
        ours = next(module for module in block.modules() if isinstance(module, Experts))
        for tokens in (1, 7, 64):
            hidden, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, 2)
            for chosen in (torch.randint(0, 8, (tokens, 8)).argsort()[:, :2], torch.tensor([[3, 6]] * tokens)):
                torch.testing.assert_close(ours(hidden, chosen, weights), theirs(hidden, chosen, weights))
        nothing = ours(torch.randn(0, HIDDEN), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert nothing.shape == (0, HIDDEN)


def test_what_corrects_the_choice_of_experts_stays_exact(tmp_path: Path) -> None:
    """transformers keeps it in float32 in a bfloat16 model: rounded, it would choose others."""
    source = open_model(FAMILIES["deepseek_v3"](tmp_path / "model"))
    frame = Frame(source, torch.bfloat16, CPU)
    name = "mlp.gate.e_score_correction_bias"
    with frame.block(1) as block:
        assert torch.equal(block.get_buffer(name), source.tensor(f"model.layers.1.{name}"))
        assert block.get_parameter("mlp.gate.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("step", "param", "words"),
    [
        ({"ignore": ["*.experts.2.*"]}, "steps.0.ignore", r"experts\.2\.w1 in 16 bits"),
        ({"ignore": ["*.w2"]}, "steps.0.ignore", "leave no expert out"),
        ({"ignore": ["model.layers.0.*"]}, "steps.0.ignore", "leave no expert out"),
        ({"symmetric": False}, "steps.0.symmetric", "zero points of experts"),
    ],
)
def test_experts_that_readers_could_not_stack_are_refused(
    tmp_path: Path, step: dict[str, Any], param: str, words: str
) -> None:
    model = FAMILIES["mixtral"](tmp_path / "model")
    with pytest.raises(FormatUnfit, match=words) as refused:
        check(spec_of(step, formats=["compressed-tensors"]), model)
    assert refused.value.param == param


def test_attention_alone_may_be_left_out_of_a_mixture(tmp_path: Path) -> None:
    model = FAMILIES["mixtral"](tmp_path / "model")
    facts = check(spec_of({"ignore": ["*.self_attn.*"]}, formats=["compressed-tensors"]), model)
    assert facts.linears == 2 * 4 * 3


def test_the_docs_name_every_family() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "methods.md").read_text(encoding="utf-8")
    table = page.partition("## Architectures")[2]
    assert [family for family in FAMILIES if f"`{family}`" not in table] == []
