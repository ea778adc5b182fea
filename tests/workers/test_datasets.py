"""Hub datasets: which files are the split that is meant, how many of them come, and what is said where none can."""

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from models.texts.documents import documents_of
from squeeze.errors import DataUnusable, DiskFull, HubUnavailable
from squeeze.specs.job_spec import Data, hub_text
from tests.hub import FaultyHub
from workers import shards
from workers.datasets import Dataset, choose, matches, parts_of, resolve, spread

TOKEN = "hf_ofAnAccountThatAcceptedTheTerms"


def parquet(*texts: str, column: str = "text") -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({column: list(texts), "url": ["x"] * len(texts)}), buffer)
    return buffer.getvalue()


def jsonl(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def _hub() -> Iterator[FaultyHub]:
    with FaultyHub() as hub:
        yield hub


@pytest.fixture
def hub(_hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    """What the Hub's client asks in this process."""
    _hub.repos.clear()
    _hub.sent.clear()
    monkeypatch.setattr(constants, "ENDPOINT", _hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", _hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return _hub


Publish = Callable[..., None]


@pytest.fixture
def publish(hub: FaultyHub, tmp_path: Path) -> Publish:
    """Puts files onto the Hub as org/texts."""

    def put(files: dict[str, bytes], revision: str = "main") -> None:
        for name, content in files.items():
            path = tmp_path / revision.replace("/", "-") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        hub.add_dataset("org/texts", tmp_path / revision.replace("/", "-"), revision)

    return put


def resolved(tmp_path: Path, source: str = "hub:org/texts") -> Dataset:
    name = hub_text(Data(source=source).source)
    assert name is not None
    return resolve(name, tmp_path / "cache", tmp_path / "scratch" / f"{abs(hash(source))}.json")


def fetched(tmp_path: Path, dataset: Dataset, wanted: int = 1 << 30, **options: Any) -> list[str]:
    into = shards.fetch(dataset, tmp_path / "cache", tmp_path / "data", wanted, None, lambda *_: None, **options)
    return list(documents_of(into, "data.source"))


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["data.jsonl"], {"default": {"train": ["data.jsonl"]}}),
        (
            ["data/train-00000-of-00001.parquet", "data/test_sft-00000-of-00001-ab12.parquet"],
            {
                "default": {
                    "test_sft": ["data/test_sft-00000-of-00001-ab12.parquet"],
                    "train": ["data/train-00000-of-00001.parquet"],
                }
            },
        ),
        (["train.jsonl", "dev.jsonl"], {"default": {"validation": ["dev.jsonl"], "train": ["train.jsonl"]}}),
        (
            ["train/a.parquet", "train/b.parquet", "testing/a.parquet"],
            {"default": {"test": ["testing/a.parquet"], "train": ["train/a.parquet", "train/b.parquet"]}},
        ),
        (
            ["en/c4-train.00000-of-00002.json.gz", "en/c4-validation.00000-of-00001.json.gz"],
            {
                "en": {
                    "train": ["en/c4-train.00000-of-00002.json.gz"],
                    "validation": ["en/c4-validation.00000-of-00001.json.gz"],
                }
            },
        ),
        (["default/partial-train/0000.parquet"], {"default": {"train": ["default/partial-train/0000.parquet"]}}),
        (
            ["README.md", "LICENSE.txt", "requirements.txt", ".cache/x.jsonl", "dataset_infos.json", "latest.txt"],
            {"default": {"train": ["latest.txt"]}},
        ),
        (["train.parquet", "train.txt", "train.csv"], {"default": {"train": ["train.parquet"]}}),
        (["train.csv", "audio.tar"], {}),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_names_of_files_and_directories_tell_the_splits(names: list[str], parts: dict[str, Any]) -> None:
    assert parts_of(names, []).files == parts


def test_a_card_s_word_goes_before_the_names(tmp_path: Path) -> None:
    names = ["a/holdout.jsonl", "a/big-1.jsonl", "a/big-2.jsonl", "b/train.parquet", "b/x/y.parquet", "c.txt"]
    configs: list[dict[str, Any]] = [
        {
            "config_name": "small",
            "data_files": [{"split": "train", "path": ["a/big-*"]}, {"split": "odd", "path": "a/holdout.jsonl"}],
        },
        {"config_name": "whole", "data_dir": "b", "default": True},
        {"config_name": "plain", "data_files": "c.txt"},
        {"config_name": "deep", "data_files": {"test": "**/y.parquet"}},
        {"config_name": "pictures", "data_files": "*.png"},
    ]
    parts = parts_of(names, configs)
    assert parts.files == {
        "small": {"train": ["a/big-1.jsonl", "a/big-2.jsonl"], "odd": ["a/holdout.jsonl"]},
        "whole": {"train": ["b/train.parquet", "b/x/y.parquet"]},
        "plain": {"train": ["c.txt"]},
        "deep": {"test": ["b/x/y.parquet"]},
    }
    assert parts.usual == "whole"


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("data/train-*", True),
        ("./data/train-*.parquet", True),
        ("data", True),
        ("data/", True),
        ("**", True),
        ("**/*.parquet", True),
        ("**/train-0?.parquet", True),
        ("*", True),
        ("*.parquet", False),
        ("data/*/x", False),
        ("other/**", False),
        ("data/train-[1-9]*", False),
        ("/".join(["**"] * 400) + "/nothing", False),
    ],
)
def test_a_card_s_patterns_mean_what_they_mean_to_the_library(pattern: str, fits: bool) -> None:
    assert matches("data/train-00.parquet", pattern) is fits


@pytest.mark.parametrize(
    ("part", "meant"),
    [
        (None, ("train", "a/train.jsonl")),
        ("validation", ("validation", "a/dev.jsonl")),
        ("dev", ("validation", "a/dev.jsonl")),
        ("a", ("train", "a/train.jsonl")),
    ],
)
def test_a_part_is_meant_by_its_usual_words(part: str | None, meant: tuple[str, str]) -> None:
    name = hub_text("hub:o/d" + (f":{part}" if part else ""))
    assert name is not None
    chosen, files = choose(name, parts_of(["a/train.jsonl", "a/dev.jsonl"], []))
    assert (chosen, files) == (meant[0], [meant[1]])


def test_one_of_several_subsets_has_to_be_named(tmp_path: Path) -> None:
    parts = parts_of(["en/train.jsonl", "de/train.jsonl", "de/test.jsonl"], [])
    for source in ("hub:o/d", "hub:o/d:train", "hub:o/d:fr/train", "hub:o/d:de/dev"):
        name = hub_text(source)
        assert name is not None
        with pytest.raises(DataUnusable, match=r"de/test, de/train, en/train"):
            choose(name, parts)
    name = hub_text("hub:o/d:de")
    assert name is not None
    assert choose(name, parts) == ("de/train", ["de/train.jsonl"])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100])
def test_every_beginning_of_the_order_is_spread_over_the_split(count: int) -> None:
    names = [str(n) for n in range(count)]
    order = spread(names)
    assert order[0] == "0" and sorted(order, key=int) == names
    if count >= 7:
        assert max(int(name) for name in order[:3]) >= count // 2


def test_only_as_many_shards_come_as_hold_the_text_that_is_wanted(
    tmp_path: Path, hub: FaultyHub, publish: Publish
) -> None:
    publish({f"data/train-{n:05d}-of-00008.parquet": parquet(f"shard {n} " + "x" * 1000) for n in range(8)})
    dataset = resolved(tmp_path)
    commit = hub.repos["datasets/org/texts"].refs["main"]
    assert dataset.origin == f"hub:org/texts@{commit}:train"
    texts = fetched(tmp_path, dataset, wanted=1500)
    assert [text.split("x")[0] for text in texts] == ["shard 0 ", "shard 4 "]
    assert len({name for name, _ in hub.sent}) == 2
    assert len(fetched(tmp_path, dataset)) == 8


def test_what_a_first_attempt_resolved_holds_for_the_next_whatever_the_branch_says_then(
    tmp_path: Path, hub: FaultyHub, publish: Publish
) -> None:
    publish({"train.jsonl": jsonl("first")})
    first = resolved(tmp_path)
    publish({"train.jsonl": jsonl("second")})
    asked = len(hub.asked)
    assert resolved(tmp_path) == first
    assert len(hub.asked) == asked
    assert resolved(tmp_path / "elsewhere") != first


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_of_a_long_file_of_lines_only_whole_lines_of_its_beginning_come(
    tmp_path: Path, hub: FaultyHub, publish: Publish, packing: str
) -> None:
    rows = jsonl(*(f"row {n} {os.urandom(24).hex()}" for n in range(12000)))
    content = {"": rows, ".gz": gzip.compress(rows), ".zst": pa.compress(rows, "zstd", asbytes=True)}[packing]
    publish({f"train.jsonl{packing}": content})
    texts = fetched(tmp_path, resolved(tmp_path), wanted=500, head_bytes_least=200_000)
    assert 1000 < len(texts) < 4000
    assert [text.split()[1] for text in texts] == [str(n) for n in range(len(texts))]
    blobs = [path.stat().st_size for path in (tmp_path / "cache").rglob("blobs/*")]
    assert max(blobs) <= 200_000 < len(content)
    assert len(fetched(tmp_path, resolved(tmp_path))) == 12000


def test_a_packed_file_unpacks_no_further_than_wanted(tmp_path: Path, publish: Publish) -> None:
    publish({"train.txt.gz": gzip.compress(b"a line of text\n" * 2_000_000)})
    fetched(tmp_path, resolved(tmp_path), wanted=500, head_bytes_least=100_000)
    assert max(path.stat().st_size for path in (tmp_path / "data").iterdir()) <= 100_000


def test_a_damaged_packed_file_is_named(tmp_path: Path, publish: Publish) -> None:
    publish({"train.txt.gz": gzip.compress(os.urandom(5000).hex().encode())[:-2000]})
    with pytest.raises(DataUnusable, match=r"train.txt.gz can't be unpacked"):
        fetched(tmp_path, resolved(tmp_path))


def test_a_mirror_that_lists_names_alone_is_asked_for_the_shards_alone(
    tmp_path: Path, hub: FaultyHub, publish: Publish
) -> None:
    publish({"train.jsonl": jsonl("one"), "test.jsonl": jsonl("two")})
    hub.faults.bare_listing = True
    try:
        hub.asked.clear()
        assert fetched(tmp_path, resolved(tmp_path)) == ["one"]
    finally:
        hub.faults.bare_listing = False
    assert not [path for method, path in hub.asked if path.endswith("test.jsonl")]


def test_another_revision_is_another_text(tmp_path: Path, publish: Publish) -> None:
    publish({"train.jsonl": jsonl("one")})
    publish({"default/train/0000.parquet": parquet("two")}, "refs/convert/parquet")
    assert fetched(tmp_path, resolved(tmp_path, "hub:org/texts@refs/convert/parquet")) == ["two"]


@pytest.mark.parametrize(
    ("source", "files", "words"),
    [
        ("hub:org/none", {}, "there is no dataset org/none .* no HF_TOKEN"),
        ("hub:org/texts@v9", {"train.jsonl": b"{}"}, "org/texts has no revision 'v9'. It has main"),
        ("hub:org/texts:dev", {"train.jsonl": b"{}", "test.jsonl": b"{}"}, "no part 'dev'; .* test, train"),
        ("hub:org/texts", {"texts.py": b"import os", "data.zip": b"x"}, r"texts\.py.*never run.*@refs/convert/parquet"),
        ("hub:org/texts", {"train.csv": b"a,b"}, r"its data as \.csv; parquet, JSONL"),
        ("hub:org/texts", {"README.md": b"# Nothing"}, "no files of data"),
    ],
    ids=["absent", "revision", "split", "script", "table", "empty"],
)
def test_what_can_not_be_found_or_read_says_what_there_is(
    tmp_path: Path, hub: FaultyHub, publish: Publish, source: str, files: dict[str, bytes], words: str
) -> None:
    if files:
        publish(files)
    with pytest.raises(DataUnusable, match=words):
        resolved(tmp_path, source)


def test_a_dataset_without_text_says_which_columns_it_has(tmp_path: Path, publish: Publish) -> None:
    publish({"train.parquet": parquet("a", column="body")})
    dataset = resolved(tmp_path)
    with pytest.raises(DataUnusable, match=r"hub:org/texts@\w+:train, train.parquet: .* \(body, url\)"):
        fetched(tmp_path, dataset)
    into = shards.fetch(dataset, tmp_path / "cache", tmp_path / "data", 1, "body", lambda *_: None)
    assert list(documents_of(into, "data.source", "body")) == ["a"]


def test_a_gated_dataset_says_where_its_terms_are(
    tmp_path: Path, hub: FaultyHub, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish({"train.jsonl": jsonl("secret")})
    hub.repos["datasets/org/texts"].token = TOKEN
    with pytest.raises(DataUnusable, match=rf"gated and the worker has no HF_TOKEN.*{hub.url}/datasets/org/texts"):
        fetched(tmp_path, resolved(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetched(tmp_path, resolved(tmp_path)) == ["secret"]


def test_a_shard_larger_than_the_disk_is_refused_with_figures(tmp_path: Path, hub: FaultyHub, publish: Publish) -> None:
    publish({"train.parquet": parquet("a")})
    dataset = resolved(tmp_path)
    (shard,) = dataset.repo.files
    vast = type(shard)(shard.name, 1 << 60, shard.digest)
    dataset = Dataset(type(dataset.repo)(dataset.repo.id, dataset.repo.commit, None, (vast,), "dataset"), "train")
    with pytest.raises(DiskFull, match=r"GiB free and org/texts/train.parquet takes 1073741824.00 GiB"):
        fetched(tmp_path, dataset)
    assert not hub.sent


def test_a_broken_card_is_no_reason_to_fail_and_a_listing_can_not_lead_out(
    tmp_path: Path, hub: FaultyHub, publish: Publish
) -> None:
    publish({"README.md": b"---\nconfigs: [: :\n---\n", "train.jsonl": jsonl("one")})
    repo = hub.repos["datasets/org/texts"]
    files = repo.commits[repo.refs["main"]]
    files["../../../escaped-train.jsonl"] = files["train.jsonl"]
    assert fetched(tmp_path, resolved(tmp_path)) == ["one"]
    assert not list(tmp_path.rglob("escaped*"))


def test_a_hub_that_is_down_is_worth_another_try(tmp_path: Path, hub: FaultyHub, publish: Publish) -> None:
    publish({"train.jsonl": jsonl("one")})
    hub.faults.status = 404  # without the Hub's own code for what is missing
    try:
        with pytest.raises(HubUnavailable):
            resolved(tmp_path)
    finally:
        hub.faults.status = None
