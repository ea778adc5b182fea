"""How many experts a step leaves, by the headers of either layout of files, and what is refused with what would do."""

from typing import Any

import pytest

from squeeze.errors import SpecInvalid
from squeeze.shapes.mixtures import experts_left, mixture_of, with_experts
from squeeze.shapes.slimmed import elements_of, narrowed
from squeeze.steps.slimming import Experts

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "hidden_size": 64}
GROUPED = {"model_type": "deepseek_v3", "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}


def shapes(experts: int, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Two blocks, of which the first is dense."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (1000, 64)}
    found["model.layers.0.mlp.gate_proj.weight"] = (128, 64)
    mlp = "model.layers.1.mlp"
    found |= {f"{mlp}.gate.weight": (experts, 64), f"{mlp}.gate.e_score_correction_bias": (experts,)}
    found[f"{mlp}.shared_experts.gate_proj.weight"] = (32, 64)
    if fused:
        return found | {f"{mlp}.experts.gate_up_proj": (experts, 64, 64), f"{mlp}.experts.down_proj": (experts, 64, 32)}
    for n in range(experts):
        found |= {f"{mlp}.experts.{n}.{name}_proj.weight": (32, 64) for name in ("gate", "up")}
        found[f"{mlp}.experts.{n}.down_proj.weight"] = (64, 32)
    return found


def asked(**fields: Any) -> Experts:
    return Experts.model_validate({"method": "experts"} | fields)


@pytest.mark.parametrize("fused", [False, True])
def test_a_share_leaves_as_many_experts_as_fit_whatever_the_layout_of_the_files(fused: bool) -> None:
    whole = shapes(8, fused)
    each = 3 * 32 * 64 + 64 + 1
    left = experts_left(asked(params_target=0.8), MIXTRAL, whole)
    settings, smaller = narrowed(asked(params_target=0.8), MIXTRAL, whole)
    assert settings["num_local_experts"] == left == 4
    assert elements_of(smaller) == elements_of(whole) - 4 * each <= 0.8 * elements_of(whole)
    assert elements_of(smaller) + each > 0.8 * elements_of(whole)
    with pytest.raises(SpecInvalid, match=r"2 in a layer, 70\.0% of the parameters stay: .* can be is 0\.7"):
        experts_left(asked(params_target=0.5), MIXTRAL, whole)


def test_a_token_goes_to_no_more_than_are_left_and_what_a_config_is_silent_of_is_the_family_s() -> None:
    silent = {"model_type": "mixtral"}
    assert mixture_of(silent, shapes(8)).chosen == 2
    assert with_experts(1, silent, shapes(8))[0] == silent | {"num_local_experts": 1, "num_experts_per_tok": 1}
    grouped, _ = with_experts(8, GROUPED | {"topk_group": 1}, shapes(16))
    assert grouped["num_experts_per_tok"] == 2


@pytest.mark.parametrize(
    ("config", "number", "words"),
    [
        (MIXTRAL, 16, "from 1 to 15, not 16"),
        (GROUPED, 4, "from 8 to 12 in steps of 4, not 4"),
        (GROUPED, 9, "experts=9 can't be, 8 or 12 can"),
    ],
)
def test_numbers_that_can_t_be_are_refused_with_those_that_can(config: dict[str, Any], number: int, words: str) -> None:
    with pytest.raises(SpecInvalid, match=words):
        experts_left(asked(experts=number), config, shapes(16))
