"""Mixtures of experts: how many a layer has, how tokens are sent to them, and what fewer leave; no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from squeeze.errors import ArchitectureUnsupported, SpecInvalid
from squeeze.shapes.bounds import can_be
from squeeze.shapes.model import number_of
from squeeze.steps.slimming import Experts

Sides = Mapping[str, tuple[int, ...]]
EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")  # of a layer; shared ones have another name
FUSED = re.compile(r"\.experts\.(gate_up_proj|down_proj)$")  # all of a layer in one tensor
ROUTER = re.compile(r"\.gate\.(weight|e_score_correction_bias)$")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHOSEN = "num_experts_per_tok"


@dataclass(frozen=True)
class Family:
    """What the config of a family is silent of where it is as usual (transformers 5.23).

    count: what it calls the number of experts. chosen: that a token goes to. groups, limit: that experts stand in, and
    that a token's are taken from. least: of a group, for its router to judge it.
    """

    count: str
    chosen: int = 1
    groups: int = 1
    limit: int = 1
    least: int = 1


FAMILIES = {
    "deepseek_v2": Family("n_routed_experts"),
    "deepseek_v3": Family("n_routed_experts", 8, 8, 4, least=2),
    "mixtral": Family("num_local_experts", 2),
    "olmoe": Family("num_experts", 8),
    "qwen2_moe": Family("num_experts", 4),
    "qwen3_moe": Family("num_experts", 8),
}


def refuse_unscored(model_type: object, param: str) -> None:
    """Raises ArchitectureUnsupported where most weights stand in experts, for which `movement` has no scores."""
    if model_type in FAMILIES:
        raise ArchitectureUnsupported(
            f"movement has no scores for the experts of a mixture, most weights of a {model_type}: take sparsegpt, "
            "wanda or magnitude, and let a step that trains follow",
            param=param,
        )


@dataclass(frozen=True)
class Mixture:
    """experts: of each layer that has some. chosen: that a token goes to, all of them in `limit` of the groups that the
    experts stand in one behind the other. least: of a group.
    """

    experts: int
    chosen: int
    groups: int
    limit: int
    least: int

    def left_of(self, experts: int) -> int:
        """How many a token goes to where so many are left."""
        return min(self.chosen, experts // self.groups * self.limit)


def mixture_of(config: Mapping[str, Any], sides: Sides) -> Mixture:
    """sides: of the model's tensors. Raises ArchitectureUnsupported where it has no experts to choose from."""
    family = FAMILIES.get(str(config.get("model_type")))
    numbers = [int(found[2]) + 1 for name in sides if (found := EXPERT.search(name))]
    numbers += [each[0] for name, each in sides.items() if FUSED.search(name)]
    if family is None or not numbers:
        raise ArchitectureUnsupported(
            f"a {config.get('model_type')} without experts has none to leave out; mixtures are {', '.join(FAMILIES)}",
            param="method",
        )
    chosen = number_of(config, CHOSEN) or family.chosen
    grouped = family.groups > 1 or config.get("topk_method") == "group_limited_greedy"
    groups = (number_of(config, "n_group") or family.groups) if grouped else 1
    limit = (number_of(config, "topk_group") or family.limit) if grouped else 1
    if max(numbers) % groups or limit > groups:
        raise ArchitectureUnsupported(f"the model's {max(numbers)} experts don't stand in {groups} whole groups")
    return Mixture(max(numbers), chosen, groups, limit, family.least)


def experts_left(step: Experts, config: Mapping[str, Any], sides: Sides) -> int:
    """Of each layer. sides: of what is carried over. Raises SpecInvalid, with what would do."""
    mixture = mixture_of(config, sides)
    by, least = mixture.groups, mixture.groups * mixture.least
    most = mixture.experts - by
    if most < least:
        raise SpecInvalid(f"the model has {mixture.experts} experts, and can't do without any", param="method")
    if step.experts is not None:
        if not least <= step.experts <= most:
            raise SpecInvalid(
                f"the model has {mixture.experts} experts in a layer, and fewer are to stay, as many as its router "
                f"needs: {can_be('experts', least, most, by)}, not {step.experts}",
                param="experts",
            )
        if step.experts % by:
            below = step.experts // by * by
            raise SpecInvalid(
                f"experts stand in {by} groups of one size: experts={step.experts} can't be, {below} or {below + by} "
                "can",
                param="experts",
            )
        return step.experts
    assert step.params_target is not None, "a step says how small"
    whole, each = sum(map(prod, sides.values())), _each(mixture, sides)
    fewest = next(left for left in range(least, mixture.experts + 1, by) if mixture.left_of(left) == mixture.chosen)
    for left in range(most, fewest - 1, -by):
        if whole - (mixture.experts - left) * each <= step.params_target * whole:
            return left
    share = ceil(1000 * (whole - (mixture.experts - fewest) * each) / whole) / 1000
    if fewest > most:
        raise SpecInvalid(
            f"a token goes to all {mixture.chosen} experts of a layer, so that no share can be met: say `experts`",
            param="params_target",
        )
    raise SpecInvalid(
        f"a token goes to {mixture.chosen} experts; with as few as that takes, {fewest} in a layer, {share:.1%} of the "
        f"parameters stay: the least that params_target can be is {share:g}; or say `experts` itself",
        param="params_target",
    )


def with_experts(left: int, config: Mapping[str, Any], sides: Sides) -> tuple[dict[str, Any], Sides]:
    """(settings, shapes) of a model with so many experts in a layer: by name those of the first ones."""
    mixture, count = mixture_of(config, sides), FAMILIES[str(config["model_type"])].count
    named = [name for name in COUNTS if name in config] or [count]
    settings = {**config, **dict.fromkeys(named, left)}
    if mixture.left_of(left) < mixture.chosen:
        settings[CHOSEN] = mixture.left_of(left)
    found = {}
    for name, each in sides.items():
        number = EXPERT.search(name)
        if number is None or int(number[2]) < left:
            routed = FUSED.search(name) or routes(name, each, mixture)
            found[name] = (left, *each[1:]) if routed else each
    return settings, found


def routes(name: str, each: tuple[int, ...], mixture: Mixture) -> bool:
    """Whether a tensor has a row for each expert of a layer, by which tokens are sent to it."""
    return ROUTER.search(name) is not None and each[0] == mixture.experts


def _each(mixture: Mixture, sides: Sides) -> float:
    """Parameters that go with one expert of each layer."""
    own = (
        prod(each)
        for name, each in sides.items()
        if EXPERT.search(name) or FUSED.search(name) or routes(name, each, mixture)
    )
    return sum(own) / mixture.experts
