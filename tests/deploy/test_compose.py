"""docker-compose.yml, as far as it can be known without a Docker engine."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.settings import VARIABLES, Settings
from storage import open_storage
from tests.deploy.files import COMPOSE, ROOT, compose, filled_in, instructions, services, variables

SECRETS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY")
OURS = ("api", "worker", "worker-cpu", "migrate")
STORES = ("postgres", "redis", "s3")


def test_it_fits_the_schema_of_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_mistake_does_not_fit_the_schema(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text(COMPOSE.read_text().replace("restart: unless-stopped", "restrt: unless-stopped", 1))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(wrong)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1


def test_no_secret_has_a_default_and_a_missing_one_stops_the_start() -> None:
    used = variables()
    assert {name for name, operator, _ in used if operator == "?"} == set(SECRETS)
    for name, operator, rest in used:
        secret = re.search(r"PASSWORD|SECRET|KEY|TOKEN", name) is not None
        assert (operator == "?") == secret, f"${{{name}}} stands with :{operator}{rest}"


def test_no_password_is_written_into_the_file() -> None:
    for name, service in services().items():
        for key, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|KEY|TOKEN", key):
                assert value is None or value.startswith("${"), f"{name} says {key}={value}"


def test_the_example_names_every_variable_and_fills_in_none() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert set(given.values()) == {""}
    assert set(SECRETS) < set(given)
    named = set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", "\n".join(lines)))
    from_outside = {key for service in services().values() for key, value in environment(service) if value is None}
    assert named == {name for name, _, _ in variables()} | from_outside
    assert "openssl rand" in "\n".join(lines)


@pytest.mark.parametrize("name", OURS)
def test_every_setting_is_one_that_the_service_knows(name: str) -> None:
    assert {key for key, _ in environment(services()[name]) if key.startswith("SQUEEZE_")} <= set(VARIABLES)


@pytest.mark.parametrize("name", OURS)
def test_the_service_takes_the_settings_as_they_are(name: str) -> None:
    secrets = dict.fromkeys(SECRETS, "0123456789abcdef")
    environ = {key: filled_in(value, secrets) for key, value in environment(services()[name]) if value is not None}
    settings = Settings.from_environment(environ)
    assert settings.database_url == "postgresql://squeeze:0123456789abcdef@postgres:5432/squeeze"
    assert settings.broker_url == "redis://:0123456789abcdef@redis:6379/0"
    assert open_storage(settings.storage_url, environ).presign("a", expires_seconds=60, filename="a") is None


def test_every_service_has_a_health_check_but_the_one_that_ends() -> None:
    for name, service in services().items():
        check = service["healthcheck"]
        if name == "migrate":
            assert check == {"disable": True}
            assert service["restart"] == "no"
        else:
            assert check["test"][0] in {"CMD", "CMD-SHELL"}
            assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", ["api", "worker", "worker-cpu"])
def test_api_and_workers_wait_for_the_migration_and_the_stores(name: str) -> None:
    waits = {other: wait["condition"] for other, wait in services()[name]["depends_on"].items()}
    assert waits == {"migrate": "service_completed_successfully", **dict.fromkeys(STORES, "service_healthy")}


def test_only_the_api_is_published_and_on_loopback_unless_told_otherwise() -> None:
    published = {name: service["ports"] for name, service in services().items() if "ports" in service}
    assert published == {"api": ["${API_ADDRESS:-127.0.0.1}:${API_PORT:-8000}:8000"]}


def test_the_stores_are_on_a_network_without_a_way_out_and_keep_their_data() -> None:
    assert compose()["networks"]["inner"] == {"internal": True}
    for name in STORES:
        service = services()[name]
        assert service["networks"] == ["inner"]
        volume, _, target = service["volumes"][0].partition(":")
        assert volume in compose()["volumes"]
        assert target.startswith("/")


@pytest.mark.parametrize("name", OURS)
def test_our_containers_have_no_privileges(name: str) -> None:
    service = services()[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "user" not in service


def test_images_are_of_a_version_or_built_from_a_target_that_exists() -> None:
    stages = {stage for stage, _, _ in instructions()}
    for service in services().values():
        if "build" in service:
            assert service["build"]["target"] in stages
        else:
            assert re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", service["image"])


def test_a_gpu_is_lent_to_one_worker_and_another_kind_needs_none() -> None:
    gpu, cpu = services()["worker"], services()["worker-cpu"]
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert (gpu["profiles"], cpu["profiles"]) == (["gpu"], ["cpu"])
    assert "deploy" not in cpu
    assert dict(environment(cpu))["SQUEEZE_DEVICE"] == "cpu"


def environment(service: dict[str, dict[str, str | None]]) -> list[tuple[str, str | None]]:
    return list((service.get("environment") or {}).items())
