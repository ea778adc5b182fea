"""What is merged, as task vectors of the base's tensors: a model's weights less the base's, or what an adapter adds.

Both are read a few rows at a time. What doesn't fit the base is refused from headers and settings, before any tensor.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.files.checkpoint import SourceModel, open_or_convert
from models.files.safetensors_file import Entry, read, read_header
from models.job import Named
from models.merge.likeness import refuse_other_settings, refuse_other_tokens, warnings_of
from models.streaming.frame import COMPUTABLE, Frame
from models.weights.finite import all_finite
from models.weights.quantized import Site
from squeeze.errors import ModelAlreadyCompressed, ModelMalformed, NotFinite, SqueezeError
from squeeze.shapes.adapters import CONFIG, PREFIX, WEIGHTS, refuse_unmergeable
from squeeze.shapes.model import COMPUTED
from squeeze.steps.merging import Entry as Wanted

PARTS = {"LORA": (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"), "IA3": (".ia3_l",)}


class Source(Protocol):
    """One of the models or adapters. kind: which of the two. warnings: what the user should know of it."""

    kind: str
    warnings: list[str]

    def touches(self, name: str) -> bool:
        """Whether it may differ from the base in a tensor, by the name that the base's files have for it."""

    def whole(self, name: str) -> bool:
        """Whether it can't be read by rows."""

    def vector(self, name: str, rows: slice, W: Tensor) -> Tensor:
        """Its task vector of some rows of a tensor, float32. W: the base's rows, float32."""


class Whole:
    """A model of the base's architecture and shapes."""

    kind = "model"

    def __init__(self, base: Frame, source: SourceModel, label: str) -> None:
        refuse_other_settings(base.source.path, source.path, label)
        refuse_other_tokens(base.source, source, label)
        self._label = label
        self._entries = _matched(base, source, label)
        self.warnings = warnings_of(base.source, source, label)

    def touches(self, name: str) -> bool:
        return name in self._entries

    def whole(self, name: str) -> bool:  # noqa: ARG002 - rows lie one behind the other
        return False

    def vector(self, name: str, rows: slice, W: Tensor) -> Tensor:
        found = rows_of(self._entries[name], rows)
        _refuse_not_finite(found, self._label, name)
        return found.to(torch.float32) - W


class Adapter:
    """A LoRA or (IA)³ adapter in peft's layout, of one of the base's linears each part."""

    kind = "adapter"

    def __init__(self, base: Frame, directory: Path, label: str, model: str, *, same_base: bool) -> None:
        config, entries = _read_adapter(directory, label)
        kind = refuse_unmergeable(config, label, model, same_base=same_base)
        sites = {site.name: site for n in range(base.count) for site in base.sites(n)}
        names = [name.removeprefix(PREFIX) for name in entries]
        self._label = label
        self._parts: dict[str, tuple[Site, str]] = {}
        for name in names:
            module = next((name.removesuffix(part) for part in PARTS[kind] if name.endswith(part)), None)
            if module is None or module not in sites:
                raise ModelMalformed(
                    f"{label} holds {name}, which is no {kind} part of a linear layer of the base's decoder blocks: it "
                    "is of another model, or trained more than that. Merge it into its base with peft's "
                    "merge_and_unload, and name the whole model"
                )
            self._parts[base.source.module_key(module, "weight")] = (sites[module], "weight")
            bias = base.source.file_key(f"{module}.bias")
            if kind == "IA3" and bias is not None:
                self._parts[bias] = (sites[module], "bias")
        if not self._parts:
            raise ModelMalformed(f"{label} holds nothing: {WEIGHTS} has no tensors")
        for entry in entries.values():
            _refuse_not_finite(read(entry), label, entry.path.name)
        self._refuse_misfits({name.removeprefix(PREFIX): entry for name, entry in entries.items()}, kind)
        # Only where there is one: with what peft looks at, it costs a process 100 MB.
        self._merged = import_module(f"models.finetune.{kind.lower()}").Merged(directory)
        theirs = str(config.get("base_model_name_or_path") or "")
        self.warnings = []
        if theirs != model:
            self.warnings.append(
                f"{label} says that it was trained on {theirs.rpartition('/')[2] or 'an unnamed model'}: that its "
                "weights are the base's can't be told"
            )

    def touches(self, name: str) -> bool:
        return name in self._parts

    def whole(self, name: str) -> bool:
        """DoRA measures the outputs' rows, which lie across those of a transposed weight."""
        site, _ = self._parts[name]
        return site.transposed and self._merged.has(f"{site.name}.lora_magnitude_vector")

    def vector(self, name: str, rows: slice, W: Tensor) -> Tensor:
        site, part = self._parts[name]
        if part == "bias":
            changed: Tensor = self._merged.bias(site.name, W)
        else:
            changed = self._merged.weight(site.name, W, transposed=site.transposed, rows=rows)
        return changed - W

    def _refuse_misfits(self, entries: dict[str, Entry], kind: str) -> None:
        for site, part in self._parts.values():
            if part == "bias":
                continue
            shapes = {
                name: entries[f"{site.name}{name}"].shape for name in PARTS[kind] if f"{site.name}{name}" in entries
            }
            if not _fits(site, shapes):
                told = ", ".join(f"{name.removeprefix('.')} {shape}" for name, shape in shapes.items())
                raise ModelMalformed(
                    f"{self._label} has {told or 'no weights'} for {site.name}, which has {site.columns} inputs and "
                    f"{site.rows} outputs in the base: it is an adapter of another model"
                )


def open_entry(base: Frame, wanted: Wanted, named: Named, model: str, converted: Path) -> Source:
    """Opens one, reading headers alone. model: what the base is called. converted: for pickled weights, rewritten."""
    label = "@".join(filter(None, (named.name, named.revision)))
    if _is_adapter(named.directory):
        return Adapter(base, named.directory, label, model, same_base=wanted.same_base)
    return Whole(base, open_or_convert(named.directory, converted), label)


def check_entry(base: Path, model: str, wanted: Wanted, directory: Path) -> None:
    """Refuses what can't be merged from its settings alone, before any weight is fetched. base: the base's directory.
    model: what it is called.
    """
    try:
        if _is_adapter(directory):
            refuse_unmergeable(_adapter_config(directory, wanted.name), wanted.name, model, same_base=wanted.same_base)
        else:
            refuse_other_settings(base, directory, wanted.name)
    except SqueezeError as error:
        error.param = "model"
        raise


def rows_of(entry: Entry, rows: slice) -> Tensor:
    """Some rows of a tensor, as stored; of one without dimensions, itself."""
    if not entry.shape:
        return read(entry)
    count = entry.shape[0]
    start, stop, _ = rows.indices(count)
    each = (entry.end - entry.start) // max(count, 1)
    shape = (stop - start, *entry.shape[1:])
    return read(replace(entry, shape=shape, start=entry.start + start * each, end=entry.start + stop * each))


def _matched(base: Frame, source: SourceModel, label: str) -> dict[str, Entry]:
    """Where each of the base's floating-point tensors lies in another model's files. What is tied may stand in either's
    files once or twice.
    """
    own = base.source
    twins = {own.file_key(head): tied for head, tied in base.ties.items()}
    found: dict[str, Entry] = {}
    known: set[str | None] = {source.file_key(head) for head in base.ties}
    for name, entry in own.entries.items():
        if COMPUTED.search(name):
            continue
        key = name if name in source.entries else source.file_key(name)
        if key is None and name in twins:
            key = source.file_key(twins[name])
        if key is None:
            raise ModelMalformed(f"{label} has no tensor {name}, which the base has: it is of another architecture")
        known.add(key)
        if source.entries[key].shape != entry.shape:
            raise ModelMalformed(
                f"{label} has tensor {key} of shape {list(source.entries[key].shape)}, the base {list(entry.shape)}: "
                "merged are models of one base, with its shapes and its vocabulary. One whose vocabulary grew has to "
                "be cut back to the base's first"
            )
        if source.entries[key].dtype.is_floating_point != entry.dtype.is_floating_point or (
            entry.dtype.is_floating_point and source.entries[key].dtype not in COMPUTABLE
        ):
            raise ModelAlreadyCompressed(
                f"{label} stores {key} as {str(source.entries[key].dtype).removeprefix('torch.')}: its weights are "
                "quantized. Name the 16-bit model that they were made from"
            )
        if entry.dtype.is_floating_point:
            found[name] = source.entries[key]
    more = [name for name in source.entries if name not in known and not COMPUTED.search(name)]
    if more:
        others = f" and {len(more) - 1} more" if len(more) > 1 else ""
        raise ModelMalformed(
            f"{label} has tensor {more[0]}{others}, which the base lacks: it is of another architecture, or quantized"
        )
    return found


def _is_adapter(directory: Path) -> bool:
    """An adapter may lie beside a whole model, which is taken then."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def _read_adapter(directory: Path, label: str) -> tuple[dict[str, Any], dict[str, Entry]]:
    config = _adapter_config(directory, label)
    if not (directory / WEIGHTS).is_file():
        raise ModelMalformed(f"{label} has no {WEIGHTS}; ask for the adapter as safetensors")
    return config, read_header(directory / WEIGHTS)


def _adapter_config(directory: Path, label: str) -> dict[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelMalformed(f"{label}: {CONFIG} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelMalformed(f"{label}: {CONFIG} is not an object")
    return config


def _fits(site: Site, shapes: Mapping[str, Sequence[int]]) -> bool:
    if ".ia3_l" in shapes:
        return tuple(shapes[".ia3_l"]) in ((site.rows, 1), (1, site.columns))
    A, B = shapes.get(".lora_A.weight", ()), shapes.get(".lora_B.weight", ())
    if len(A) != 2 or len(B) != 2 or (A[1], B[0], A[0]) != (site.columns, site.rows, B[1]):
        return False
    return tuple(shapes.get(".lora_magnitude_vector", (site.rows,))) == (site.rows,)


def _refuse_not_finite(tensor: Tensor, label: str, name: str) -> None:
    if tensor.dtype.is_floating_point and not all_finite(tensor):
        raise NotFinite(f"{label} holds NaN or infinity in {name}; it is damaged at its source: leave it out")
