"""Streamed safetensors files, read back by the safetensors library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.formats.shards import Piece, write_shards
from models.progress import Silent
from squeeze.errors import CompressionBug

TENSORS = {
    "a.bytes": torch.randint(0, 255, (3,), dtype=torch.uint8),
    "a.half": torch.randn(5, 3, dtype=torch.bfloat16),
    "b.long": torch.arange(7),
    "b.none": torch.empty(0, 4),
    "c.float": torch.randn(33, 2),
    "c.scalar": torch.tensor(2.5),
    "c.turned": torch.randn(4, 6).t(),
}


def piece(name: str) -> Piece:
    tensor = TENSORS[name]
    return Piece({name: (tensor.dtype, tuple(tensor.shape))}, lambda: {name: tensor})


def test_a_small_model_is_one_file_that_the_library_reads_back(tmp_path: Path) -> None:
    size_bytes = write_shards(tmp_path, [piece(name) for name in TENSORS], Silent())

    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert size_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_model_is_cut_into_shards_that_the_index_names(tmp_path: Path) -> None:
    write_shards(tmp_path, [piece(name) for name in TENSORS], Silent(), shard_bytes=100)

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_a_tensor_is_made_only_when_the_ones_before_are_on_disk(tmp_path: Path) -> None:
    alive: list[str] = []

    def made(name: str) -> dict[str, Tensor]:
        assert not alive
        alive.append(name)
        return {name: TENSORS[name]}

    class Notes(Silent):
        def advance(self, done: int, total: int, unit: str) -> None:
            alive.clear()

    pieces = [Piece(piece(name).shapes, lambda name=name: made(name)) for name in TENSORS]
    write_shards(tmp_path, pieces, Notes())


def test_a_tensor_that_is_not_as_announced_is_a_bug(tmp_path: Path) -> None:
    wrong = Piece({"x": (torch.float32, (2,))}, lambda: {"x": torch.zeros(3)})

    with pytest.raises(CompressionBug, match="announced"):
        write_shards(tmp_path, [wrong], Silent())


def test_two_tensors_of_one_name_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(CompressionBug, match="twice"):
        write_shards(tmp_path, [piece("a.half"), piece("a.half")], Silent())
