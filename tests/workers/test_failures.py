"""What exceptions in a job mean, from real ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from squeeze.errors import ModelMalformed, SqueezeError
from workers.failures import meaning


def means(act: Callable[[], object], scratch: Path) -> SqueezeError:
    try:
        act()
    except BaseException as error:  # noqa: BLE001 - any that the deed raises
        return meaning(error, scratch, 5 << 30, 7 << 30)
    raise AssertionError("nothing was raised")


def test_memory_that_torch_can_not_have_is_the_hosts(tmp_path: Path) -> None:
    error = means(lambda: torch.empty(1 << 60, dtype=torch.uint8), tmp_path)
    assert (error.code, "5.0 GiB" in error.message) == ("out_of_memory_host", True)


def test_memory_that_python_can_not_have_is_the_hosts(tmp_path: Path) -> None:
    assert means(lambda: bytearray(1 << 60), tmp_path).code == "out_of_memory_host"


def test_the_gpus_memory_is_told_from_the_hosts(tmp_path: Path) -> None:
    def act() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    error = means(act, tmp_path)
    assert (error.code, "7.0 GiB" in error.message) == ("out_of_memory_gpu", True)


def test_a_full_disk_says_where_and_how_much_is_free(tmp_path: Path) -> None:
    def act() -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x")

    error = means(act, tmp_path)
    assert (error.code, "GiB free" in error.message) == ("disk_full", True)


def test_a_full_disk_is_seen_through_what_was_raised_because_of_it(tmp_path: Path) -> None:
    def act() -> None:
        try:
            with Path("/dev/full").open("w") as file:
                file.write("x")
        except OSError as error:
            raise RuntimeError("could not save") from error

    assert means(act, tmp_path).code == "disk_full"


def test_an_error_of_ours_stays_what_it_is(tmp_path: Path) -> None:
    def act() -> None:
        raise ModelMalformed("no config.json", param="model")

    error = means(act, tmp_path)
    assert (error.code, error.message, error.param) == ("model_malformed", "no config.json", "model")


def test_anything_else_is_a_bug_told_by_type_and_place_but_not_by_its_words(tmp_path: Path) -> None:
    error = means(lambda: json.loads("{secret"), tmp_path)
    assert error.code == "compression_bug"
    assert "JSONDecodeError in decoder.py:" in error.message
    assert "secret" not in error.message
    assert "/" not in error.message.split(" in ")[1].split(":")[0]


def test_a_bug_in_a_room_of_ours_names_its_file_from_the_root(tmp_path: Path) -> None:
    def act() -> None:
        from workers.fraction import Course

        Course().advance("1", 2)  # type: ignore[arg-type]

    assert "workers/fraction.py:" in means(act, tmp_path).message


@pytest.mark.gpu
def test_a_real_gpu_that_is_full(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert means(lambda: torch.empty(1 << 60, dtype=torch.uint8, device="cuda"), tmp_path).code == "out_of_memory_gpu"
