"""A model that is cut from another: some of the decoder blocks, everything else as it is, on disk."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from models.files.architectures import Architecture
from models.files.checkpoint import SourceModel, open_model
from models.files.disk import write_whole
from models.formats.directory import without_private, write_companions, write_json, written_whole
from models.formats.shards import Piece, write_shards
from models.progress import Notify, Silent
from models.streaming.frame import Frame
from squeeze.errors import ArchitectureUnsupported, ModelMalformed
from squeeze.shapes.model import COMPUTED

PARAM = "student.layers"
INSTEAD = "name a `model` as student"
COUNT = "num_hidden_layers"  # what transformers calls it, whatever the family's files do
# Settings that hold one entry for each block.
BY_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")


def refuse_uncuttable(frame: Frame, layers: int) -> None:
    """Raises where a teacher has not so many blocks to leave some out; needs its config alone."""
    if layers >= frame.count:
        raise ModelMalformed(
            f"the teacher has {frame.count} decoder blocks; a student that is cut from it has fewer, not {layers}",
            param=PARAM,
        )


def refuse_uneven(source: SourceModel, param: str | None = PARAM, instead: str = INSTEAD) -> None:
    """Raises where what a block does depends on its number alone; needs the config alone."""
    if source.config.get("scale_attn_by_inverse_layer_idx"):
        raise ArchitectureUnsupported(
            f"this model's attention depends on the number of its block, so that it can't be cut; {instead}",
            param=param,
        )


def cut(
    source: SourceModel,
    kept: Sequence[int],
    out: Path,
    notify: Notify | None = None,
    *,
    param: str | None = PARAM,
    instead: str = INSTEAD,
) -> SourceModel:
    """The model that has these blocks, written as a directory of its own unless an earlier attempt did that.

    One tensor is in memory at a time. Raises ArchitectureUnsupported, naming `param` and what to do instead, where
    blocks of this family are not the same once they stand in another place.
    """

    def refuse(model: SourceModel) -> None:
        _refuse_changed(source, model, kept, param, instead)

    settings, pieces = cut_config(source, kept), _pieces(source, kept)
    return written(source, out, json.dumps(list(kept)), settings, pieces, notify or Silent(), refuse)


def written(
    source: SourceModel,
    out: Path,
    told: str,
    settings: Mapping[str, Any],
    pieces: Sequence[Piece],
    notify: Notify,
    refuse: Callable[[SourceModel], None] | None = None,
    companions: Path | None = None,
) -> SourceModel:
    """A model that another was cut to, written as a directory of its own unless an earlier attempt did that.

    told: how it was cut. settings: of `config.json`. refuse: raises where what was written is not what it should be.
    companions: a directory of what stands beside the weights, where that is not the source's.
    """
    note, mark = out.with_name(f"{out.name}-by"), json.dumps([told, _origin(source)])
    if not (out.is_dir() and note.is_file() and note.read_text(encoding="utf-8") == mark):
        with written_whole(out) as partial:
            if companions is None:
                write_companions(source, partial)
            else:
                shutil.copytree(companions, partial, dirs_exist_ok=True)
            write_json(partial / "config.json", settings)
            write_shards(partial, pieces, notify)
            if refuse is not None:
                refuse(open_model(partial))
        write_whole(note, mark)
    return open_model(out)


def cut_config(source: SourceModel, kept: Sequence[int]) -> dict[str, Any]:
    """`config.json` of a model with these blocks alone; what says something of each block says it of those."""
    whole = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    count = int(getattr(whole, COUNT))
    settings = without_private(source.config)
    for name in {COUNT, whole.attribute_map.get(COUNT, COUNT)}:
        if name in settings or name == whole.attribute_map.get(COUNT, COUNT):
            settings[name] = len(kept)
    for name in BY_BLOCK:
        told = getattr(whole, name, None)  # where the file leaves it out, transformers derives it from the count
        if isinstance(told, list | tuple) and len(told) == count:
            settings[name] = [told[n] for n in kept]
    if isinstance(whole_dense := getattr(whole, "first_k_dense_replace", None), int):
        settings["first_k_dense_replace"] = sum(n < whole_dense for n in kept)
    if hasattr(whole, "mlp_only_layers"):
        step, dense = whole.decoder_sparse_step, set(whole.mlp_only_layers or ())
        settings["mlp_only_layers"] = [
            place for place, n in enumerate(kept) if n in dense or not whole.num_experts or (n + 1) % step
        ]
        settings["decoder_sparse_step"] = 1
    return settings


def _blocks_of(source: SourceModel) -> list[nn.Module]:
    frame = Frame(source, torch.float32, torch.device("cpu"))
    return [frame.skeleton(n) for n in range(frame.count)]


def _pieces(source: SourceModel, kept: Sequence[int]) -> list[Piece]:
    """Every tensor of the student under the name that its new place gives it; buffers that models compute are left
    out, and so are blocks beyond the config's, which only predict further tokens.
    """
    places, block = {number: place for place, number in enumerate(kept)}, _block_names(source.row)
    pieces = []
    for name in source.names():
        found = block.match(name)
        if COMPUTED.search(name) or (found is not None and int(found[2]) not in places):
            continue
        new = name if found is None else f"{found[1]}{places[int(found[2])]}.{name[found.end() :]}"
        pieces.append(_copy(source, name, new))
    return pieces


def _block_names(row: Architecture) -> re.Pattern[str]:
    """Of a block's tensors in files: with the base model's prefix, without it, or with two. Groups: what stands before
    the block's number, and that.
    """
    prefix = f"{row.prefix}."
    return re.compile(rf"^((?:{re.escape(prefix)})*{re.escape(row.blocks.removeprefix(prefix))}\.)(\d+)\.")


def _copy(source: SourceModel, name: str, new: str) -> Piece:
    entry = source.entries[name]

    def make() -> dict[str, Tensor]:
        return {new: source.tensor(name)}

    return Piece({new: (entry.dtype, entry.shape)}, make)


def _refuse_changed(
    source: SourceModel, student: SourceModel, kept: Sequence[int], param: str | None, instead: str
) -> None:
    """Compares each block with the one that it was: its modules, their settings, and the tensors in the files."""
    refuse_uneven(source, param, instead)
    before = _blocks_of(source)
    frame = Frame(student, torch.float32, torch.device("cpu"))
    frame.refuse_misfits()
    for place, number in enumerate(kept):
        was, now = settings_of(before[number]), settings_of(frame.skeleton(place))
        if was != now:
            names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
            raise ArchitectureUnsupported(
                f"block {number} of a {source.config['model_type']} would not be the same as block {place} of a "
                f"smaller one ({', '.join(names[:3])} would change): such a model can't be cut; {instead}",
                param=param,
            )


def settings_of(block: nn.Module) -> dict[str, object]:
    """What the modules of a block are and are set to, but for where the block stands."""
    found: dict[str, object] = {}
    for path, module in block.named_modules():
        found[path] = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, str | int | float | bool | None) and name not in ("layer_idx", "layer_id"):
                found[f"{path}.{name}".removeprefix(".")] = value
        for name, parameter in module.named_parameters(recurse=False):
            found[f"{path}.{name}".removeprefix(".")] = tuple(parameter.shape)
    return found


def _origin(source: SourceModel) -> list[object]:
    """Of what the student is cut from, so that another model's is not taken for it."""
    files = sorted({entry.path for entry in source.entries.values()})
    return [source.config, [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]
