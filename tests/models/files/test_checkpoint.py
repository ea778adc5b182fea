"""Model directories of strangers: what is read, what is refused and how."""

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.files.checkpoint import convert_legacy, has_legacy_weights_only, open_model
from models.files.safetensors_file import read, read_header
from squeeze.errors import (
    ArchitectureUnsupported,
    ModelAlreadyCompressed,
    ModelMalformed,
    ModelUnsafe,
)
from tests.models import tiny


def test_every_dtype_is_read_as_the_reference_library_reads_it(tmp_path):
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5)).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    } | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "f8": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    found = {name: read(entry) for name, entry in read_header(tmp_path / "x.safetensors").items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())


def damaged(kind: str, good: bytes) -> bytes:
    header_bytes = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + header_bytes])

    def with_header(changed: object) -> bytes:
        raw = json.dumps(changed).encode()
        return struct.pack("<Q", len(raw)) + raw + good[8 + header_bytes :]

    name = next(name for name in header if name != "__metadata__")
    return {
        "empty": b"",
        "cut": good[: len(good) // 2],
        "one byte short": good[:-1],
        "huge header": struct.pack("<Q", 2**60) + good[8:],
        "not json": good[:8] + b"x" * header_bytes + good[8 + header_bytes :],
        "a list": with_header([1]),
        "negative offset": with_header(header | {name: header[name] | {"data_offsets": [-4, 4]}}),
        "beyond the end": with_header(header | {name: header[name] | {"data_offsets": [0, 2**40]}}),
        "wrong shape": with_header(header | {name: header[name] | {"shape": [7, 7]}}),
        "unknown dtype": with_header(header | {name: header[name] | {"dtype": "F3"}}),
        "a pickle": pickle.dumps({"a": 1}),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "cut",
        "one byte short",
        "huge header",
        "not json",
        "a list",
        "negative offset",
        "beyond the end",
        "wrong shape",
        "unknown dtype",
        "a pickle",
    ],
)
def test_a_damaged_weight_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(4, 4), "b": torch.randn(2)}, path)
    path.write_bytes(damaged(kind, path.read_bytes()))
    with pytest.raises(ModelMalformed, match=r"model\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "missing.safetensors", "weights.bin", 7])
def test_an_index_can_t_lead_out_of_the_directory(tmp_path, name):
    model = tiny.FAMILIES["llama"](tmp_path / "model")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelMalformed, match="index"):
        open_model(model)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "mamba"}, ArchitectureUnsupported, "Supported: .*llama"),
        ({"model_type": "custom", "auto_map": {"AutoModel": "x.Y"}}, ModelUnsafe, "never run"),
        ({"model_type": None}, ModelMalformed, "model_type"),
        ({"quantization_config": {"quant_method": "awq"}}, ModelAlreadyCompressed, "16-bit"),
    ],
)
def test_a_config_that_can_t_be_compressed_says_why(tmp_path, change, error, words):
    model = tiny.FAMILIES["llama"](tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=words):
        open_model(model)


class Evil:
    def __reduce__(self):
        return (print, ("the pickle ran",))


def test_pickled_weights_are_converted_without_running_them(tmp_path, capfd):
    model = tiny.FAMILIES["llama"](tmp_path / "model")
    state = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(state, model / "pytorch_model.bin")
    assert has_legacy_weights_only(model)
    convert_legacy(model, tmp_path / "converted")
    source = open_model(tmp_path / "converted")
    assert {name: source.tensor(name).sum() for name in source.names()} == {n: t.sum() for n, t in state.items()}

    torch.save({"weight": Evil()}, model / "pytorch_model.bin")
    with pytest.raises(ModelUnsafe, match="safetensors"):
        convert_legacy(model, tmp_path / "evil")
    assert "the pickle ran" not in capfd.readouterr().out


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_names_without_the_base_model_s_prefix_are_found(tmp_path, family):
    model = tiny.FAMILIES[family](tmp_path / "model")
    source = open_model(model)
    prefix = f"{source.row.prefix}."
    whole = {name: source.tensor(name) for name in source.names()}
    state = {name.removeprefix(prefix): tensor for name, tensor in whole.items()}
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    bare = open_model(model)
    for name, tensor in whole.items():
        key = bare.file_key(name)
        assert key is not None and torch.equal(bare.tensor(key), tensor)
