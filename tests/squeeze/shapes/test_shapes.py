"""What headers tell of a model's shape: blocks, inputs that linears share, experts, what is left alone."""

from squeeze.shapes.model import Group, shape_of
from tests.squeeze.making import config, llama, tensors


def test_linears_that_read_one_input_are_one_group() -> None:
    shape = llama(2)
    assert len(shape.blocks) == 2
    assert shape.blocks[0].groups == (
        Group(256, (256, 128, 128)),
        Group(256, (256,)),
        Group(256, (768, 768)),
        Group(768, (256,)),
    )
    assert shape.blocks[0].weights == shape.blocks[0].active == shape.blocks[0].elements - 2 * 256
    assert (shape.outside, shape.hidden, shape.vocabulary, shape.positions) == (4096 * 256 + 256, 256, 4096, 512)
    assert shape.elements == sum(rows * (columns or 1) for rows, columns in _sides(tensors(2)))


def test_what_a_pattern_ignores_is_run_but_not_compressed() -> None:
    whole, part = llama(1).blocks[0], shape_of(config(), tensors(1), ignored=["*.mlp.*"]).blocks[0]
    assert (part.active, part.elements) == (whole.active, whole.elements)
    assert part.groups == whole.groups[:2]


def test_an_expert_sees_its_share_of_the_tokens() -> None:
    names = {f"model.layers.0.mlp.experts.{n}.{name}.weight": (64, 32) for n in range(8) for name in ("w1", "w3")}
    shape = shape_of(config(32, num_local_experts=8, num_experts_per_tok=2), names)
    assert shape.blocks[0].groups == tuple(Group(32, (64, 64), 0.25) for _ in range(8))
    assert shape.blocks[0].active == shape.blocks[0].elements / 4


def test_gpt2_keeps_its_weights_the_other_way_round() -> None:
    shape = shape_of({"model_type": "gpt2", "n_embd": 96}, {"h.0.attn.c_attn.weight": (96, 288)})
    assert (shape.blocks[0].groups, shape.hidden) == ((Group(96, (288,)),), 96)


def test_float16_is_computed_in_float32_on_a_cpu() -> None:
    half, brain = (shape_of(config(), tensors(1), dtype) for dtype in ("F16", "BF16"))
    assert (half.stored_bytes, half.computed_bytes) == (2, 4)
    assert (brain.stored_bytes, brain.computed_bytes) == (2, 2)


def _sides(shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, int]]:
    return [(sides[0], sides[1] if len(sides) > 1 else 0) for sides in shapes.values()]
