"""The lock files hold what pyproject.toml asks for, and nothing of one machine."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.files import ROOT

EXTRAS = ("api", "worker", "dev")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(extra: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{extra}.lock").read_text().splitlines()
    pins = [line.partition("==") for line in lines if line[:1].isalnum()]
    assert all(equals and version for _, equals, version in pins)
    return {canonicalize_name(name): version for name, _, version in pins}


def wanted(extra: str) -> list[Requirement]:
    found = [Requirement(line) for line in PROJECT["optional-dependencies"][extra]]
    of_others = [each for one in found if one.name == PROJECT["name"] for other in one.extras for each in wanted(other)]
    everywhere = [Requirement(line) for line in PROJECT["dependencies"]]
    return [one for one in found if one.name != PROJECT["name"]] + of_others + everywhere


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_lock_fits_what_its_extra_asks_for(extra: str) -> None:
    pins = locked(extra)
    for requirement in wanted(extra):
        name = canonicalize_name(requirement.name)
        if name != "gptqmodel":
            assert requirement.specifier.contains(pins[name], prereleases=True), requirement


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_lock_holds_nothing_of_the_machine_that_made_it(extra: str) -> None:
    text = (ROOT / "requirements" / f"{extra}.lock").read_text()
    pins = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert not [line for line in pins if re.search(r"[/+@;]|index-url|find-links|^-", line)]
    assert not re.search(r"file:|/\w+/\w+.*pyproject", text)


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_packages_of_cuda_are_left_to_torch(extra: str) -> None:
    assert not [name for name in locked(extra) if re.match(r"nvidia|cuda|triton", name)]


def test_the_api_is_locked_without_torch() -> None:
    assert not {"torch", "transformers", "safetensors", "accelerate"} & set(locked("api"))


def test_torch_is_pinned_without_the_name_of_a_build() -> None:
    [torch] = [requirement for requirement in wanted("worker") if requirement.name == "torch"]
    assert str(torch.specifier) == f"=={locked('worker')['torch']}"


def test_one_package_has_one_version_in_all_locks() -> None:
    everything = locked("dev")
    for extra in ("api", "worker"):
        assert locked(extra).items() <= everything.items()


def test_deepspeed_is_wanted_by_nobody_but_its_own_file() -> None:
    lines = (ROOT / "requirements" / "deepspeed.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert {str(one) for one in wanted("deepspeed") if one.name == "deepspeed"} <= set(pins)
    names = {name for name, _, _ in (pin.partition("==") for pin in pins)}
    assert not [extra for extra in EXTRAS if names & set(locked(extra))]


def test_gptqmodel_stands_in_a_file_of_its_own() -> None:
    lines = (ROOT / "requirements" / "gptqmodel.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins == [str(requirement) for requirement in wanted("worker") if requirement.name == "gptqmodel"]
    assert not [extra for extra in EXTRAS if "gptqmodel" in locked(extra)]
