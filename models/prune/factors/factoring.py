"""How a step that factors linears comes to their ranks, and what the report says of it."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from models.bits.sensitivity import GRADIENT_LENGTH, GRADIENT_SEQUENCES
from models.measuring.speed import speeds
from models.progress import Notify
from models.prune import svd
from models.prune.factors import ranks
from models.prune.factors.frame import FactoredFrame
from models.prune.factors.ranks import Cut
from models.prune.factors.spectra import Gradients, Group, measured
from models.quantize.problem import Problem, Solution
from models.resources import available_host_bytes
from models.streaming import engine
from models.streaming.frame import Frame
from models.streaming.streams import Room
from squeeze.names import Format
from squeeze.objects import Stage
from squeeze.reports.factoring import FactoredLayer
from squeeze.reports.report import Factoring
from squeeze.steps.factoring import SVD, Sides
from squeeze.steps.schemes import Scheme


@dataclass(frozen=True)
class Ranked:
    """schemes: of the linears that are factored. cuts: of these and of those that stay as they are. groups: what each
    rank would lose, where that was measured. gradients: by which outputs are weighed. blocks: that linears are in.
    """

    schemes: dict[str, Scheme]
    cuts: dict[str, Cut]
    sides: dict[str, Sides]
    groups: list[Group]
    gradients: Gradients | None
    blocks: dict[str, int]

    def prune(self, problem: Problem, step: SVD) -> Solution:
        """As the step's own, with gradients."""
        if self.gradients is None:
            return svd.prune(problem, step)
        seen = self.gradients.of(self.blocks[problem.names[0]], problem.names, problem.W.device)
        return svd.prune(replace(problem, gradients=seen), step)


def ranked(
    frame: Frame,
    step: SVD,
    calibration: Tensor,
    directory: Path,
    fingerprint: str,
    notify: Notify,
    memory_bytes: int | None = None,
) -> Ranked:
    """calibration: (n, T) int64. directory: keeps what was measured. fingerprint: of all that decides that, target and
    ranks not being part of it. Raises SpecInvalid where the target can't be met.
    """
    names = engine.schemes_of(frame, step)
    sites = {site.name: (n, site) for n in range(frame.count) for site in frame.sites(n) if site.name in names}
    sides = {name: Sides(site.rows, site.columns) for name, (_, site) in sites.items()}
    parameters = frame.source.parameters
    even = ranks.uniform(step, parameters, sides)
    frame.refuse_misfits()
    notify.stage(Stage.calibrating)
    room = Room(available_host_bytes() // 2 if memory_bytes is None else memory_bytes, directory / "activations")
    groups, gradients = measured(frame, step, list(sides), calibration, directory, fingerprint, room, notify)
    cuts = even if step.ranks == "uniform" else ranks.chosen(step, parameters, sides, groups)
    bits = 8 * frame.source.dtype.itemsize
    schemes = {
        name: Scheme("factored", bits, "channel", rank=cut.rank, basis=cut.basis)
        for name, cut in cuts.items()
        if cut.rank is not None
    }
    left = sum(one.whole for one in sides.values()) - ranks.kept(cuts, sides)
    notify.event(
        "info",
        f"{len(schemes)} of {len(sides)} linears become two factors, which have {left:,} parameters fewer",
    )
    return Ranked(schemes, cuts, sides, groups, gradients, {name: n for name, (n, _) in sites.items()})


def told(
    step: SVD,
    made: Ranked,
    frame: Frame,
    done: engine.Quantization,
    calibration: Tensor,
) -> Factoring:
    """The report's part. calibration: (n, T) int64, whose first sequence is also what speeds are measured on."""
    gone, _ = ranks.lost(step, made.cuts, made.groups)
    source = frame.source
    after = source.parameters - sum(one.whole for one in made.sides.values()) + ranks.kept(made.cuts, made.sides)
    saved = source.parameters - after
    errors = {layer.name: layer.relative_error for block in done.blocks for layer in block.layers}
    sharing = Counter(cut.basis for cut in made.cuts.values() if cut.rank is not None)
    layers = [
        FactoredLayer(
            name=name,
            rows=made.sides[name].rows,
            columns=made.sides[name].columns,
            rank=cut.rank,
            basis=cut.basis,
            parameters=_own(cut, made.sides[name], sharing[cut.basis]),
            energy_kept=None if cut.rank is None else 1 - errors[name],
        )
        for name, cut in made.cuts.items()
    ]
    factored, merged = (FactoredFrame(frame, done.model, merged=one) for one in (False, True))
    before, split, whole = speeds((frame, factored, merged), calibration[0])
    return Factoring(
        method=step.method,
        target=step.params_target,
        measure=_measure(step, calibration),
        parameters_before=source.parameters,
        parameters_after=after,
        factor_bytes=source.weight_bytes - saved * source.dtype.itemsize,
        linears=len(layers),
        factored=sum(one.rank is not None for one in layers),
        shared=sum(count for count in sharing.values() if count > 1),
        lost=gone if step.ranks == "loss" else None,
        layers=layers,
        speed_before=before,
        speed_factored=split,
        speed_merged=whole,
    )


def saved_by_factors(told: Factoring, formats: Collection[Format]) -> str:
    """What the user should know first: where the factors save something, and where they don't."""
    said = [
        f"with factors of {told.factored} of {told.linears} linears the model has {told.parameters_after:,} parameters"
        f", {told.parameters_after / told.parameters_before:.1%} of {told.parameters_before:,}"
    ]
    if "onnx" in formats:
        said.append("onnx holds the factors, and is smaller for it")
    if "safetensors" in formats:
        said.append(
            "safetensors holds them multiplied out, which every loader takes: as many parameters and bytes as before, "
            "and no quicker" + ("" if "onnx" in formats else " (ask for onnx to have the factors)")
        )
    return "; ".join(said)


def multiplied_out(told: Factoring) -> str:
    """What the user should know first where codes were made of the product."""
    return (
        f"{told.factored} of {told.linears} linears were factored, and multiplied out again before they were rounded: "
        f"the result has {told.parameters_before:,} parameters, as the original"
    )


def _own(cut: Cut, sides: Sides, sharing: int) -> int:
    if cut.rank is None:
        return sides.whole
    return cut.rank * sides.rows + cut.rank * sides.columns // sharing


def _measure(step: SVD, calibration: Tensor) -> str:
    if not step.gradients:
        return f"energy of a linear's outputs, of a token; from {calibration.numel():,} calibration tokens"
    count, length = min(len(calibration), GRADIENT_SEQUENCES), min(calibration.shape[1], GRADIENT_LENGTH)
    return (
        f"½ tr(G ΔW H ΔWᵀ) in nats a token, with what is added to G and H; H from {calibration.numel():,} calibration "
        f"tokens, G from {count * length:,}"
    )
