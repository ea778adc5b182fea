"""The mixtures are llama.cpp's; the expected types were read from files that its own quantizer made."""

from models.ggml.mixture import Build, block_type, whole

LLAMA_8B = Build("llama", layers=32, sharing=4, experts=0, tied=False)
MIXTRAL = Build("llama", layers=32, sharing=4, experts=8, tied=False)
SMALL = Build("llama", layers=5, sharing=2, experts=0, tied=True)


def layers_of(kind: str, tensor: str, build: Build = LLAMA_8B) -> list[int]:
    return [n for n in range(build.layers) if block_type("q4_k_m", f"blk.{n}.{tensor}.weight", 4096, build) == kind]


def test_q4_k_m_gives_values_and_ways_down_more_bits_in_the_outer_and_every_third_layer() -> None:
    expected = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]

    assert layers_of("q6_k", "attn_v") == layers_of("q6_k", "ffn_down") == expected
    assert layers_of("q4_k", "attn_q") == layers_of("q4_k", "ffn_up") == list(range(32))
    assert layers_of("q6_k", "attn_v", SMALL) == [2, 4]


def test_the_head_has_six_bits_and_the_embedding_too_where_it_is_the_head() -> None:
    assert block_type("q4_k_m", "output.weight", 4096, LLAMA_8B) == "q6_k"
    assert block_type("q4_k_m", "token_embd.weight", 4096, LLAMA_8B) == "q4_k"
    assert block_type("q2_k", "token_embd.weight", 256, SMALL) == "q6_k"


def test_q2_k_spends_more_on_shared_values_and_on_what_leaves_a_part() -> None:
    assert block_type("q2_k", "blk.5.attn_v.weight", 4096, LLAMA_8B) == "q4_k"
    assert block_type("q2_k", "blk.2.attn_v.weight", 256, SMALL) == "q3_k"
    assert block_type("q2_k", "blk.5.attn_output.weight", 4096, LLAMA_8B) == "q3_k"
    assert block_type("q2_k", "blk.5.ffn_down.weight", 14336, LLAMA_8B) == "q3_k"
    assert block_type("q2_k", "blk.5.ffn_gate.weight", 4096, LLAMA_8B) == "q2_k"


def test_small_parts_of_eight_experts_have_eight_bits() -> None:
    assert block_type("q4_k_m", "blk.5.attn_k.weight", 4096, MIXTRAL) == "q8_0"
    assert block_type("q4_k_m", "blk.5.attn_v.weight", 4096, MIXTRAL) == "q8_0"


def test_rows_that_super_blocks_do_not_fill_get_blocks_of_32_and_others_none() -> None:
    assert [whole(name, 576) for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")] == [
        "q4_0",
        "q4_0",
        "q5_0",
        "q5_1",
        "q8_0",
    ]
    assert whole("q4_k", 100) == "f16"
    assert block_type("q4_k_m", "output.weight", 576, LLAMA_8B) == "q8_0"
