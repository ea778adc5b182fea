"""Whatever has two halves, one that the service knows without torch and one that does the work, has both."""

import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
from transformers import AutoConfig

import models
from models.files.architectures import TABLE, architecture_of
from models.finetune import ia3
from models.formats import Layout
from models.streaming.frame import Frame
from squeeze.names import Format
from squeeze.shapes.architectures import ARCHITECTURES, HELD_BY
from squeeze.specs.formats import CAPACITIES
from squeeze.steps.every import STEPS, Kind, tag_of
from squeeze.steps.finetuning import IA3
from tests.models.engine_parts import frame_of
from tests.models.tiny import FAMILIES

ROOM = Path(models.__file__).parent


def modules_with(folder: str, *functions: str) -> dict[str, ModuleType]:
    """The modules of a folder of this room that define all these functions themselves, by file name."""
    found = {path.stem: import_module(f"models.{folder}.{path.stem}") for path in (ROOM / folder).glob("[!_]*.py")}
    return {
        name: module
        for name, module in found.items()
        if all(inspect.isfunction(getattr(module, function, None)) for function in functions)
        and all(getattr(module, function).__module__ == module.__name__ for function in functions)
    }


def test_every_method_has_its_spec_and_its_file() -> None:
    for by_block, ending in ((False, ""), (True, "_block")):
        specs = {tag_of(method) for method in STEPS if method.by_block == by_block}
        files = {f"{kind}.{name}" for kind in get_args(Kind) for name in modules_with(kind, kind + ending)}
        assert specs == files


def test_every_format_has_its_capacity_and_its_file() -> None:
    parts = [name for name in vars(Layout) if not name.startswith("_")]
    files = {name.replace("_", "-") for name in modules_with("formats", *parts)}
    assert files == {name for name, capacity in CAPACITIES.items() if capacity.held}
    assert set(CAPACITIES) == set(get_args(Format))


def test_every_architecture_is_held_by_a_format_and_tried_by_these_tests() -> None:
    assert set(ARCHITECTURES) == set(FAMILIES)
    assert set(TABLE) <= set(ARCHITECTURES)
    assert all(formats and set(formats) <= set(CAPACITIES) for formats in HELD_BY.values())


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_an_architecture_s_row_says_where_its_blocks_base_model_and_head_lie(tmp_path: Path, family: str) -> None:
    frame: Frame = frame_of(FAMILIES[family](tmp_path / "model"))
    row = architecture_of({"model_type": family})
    assert AutoConfig.from_pretrained(tmp_path / "model").model_type == family
    assert row.prefix == frame.model.base_model_prefix
    assert row.blocks.startswith(f"{row.prefix}.")
    assert frame.count == 2
    assert all(frame.sites(n) for n in range(frame.count))
    assert len(ia3.sites_of(frame, IA3(method="ia3"))) >= frame.count  # which knows layers by their names
    assert all(frame.source.file_key(f"{site.name}.weight") for n in range(frame.count) for site in frame.sites(n))
