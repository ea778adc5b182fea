"""Settings: what they are by default, and what a bad variable is told."""

from pathlib import Path

import pytest

from jobs.settings import VARIABLES, Settings
from squeeze.errors import SpecInvalid


def test_with_nothing_set_everything_lies_in_one_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_environment({})
    data = tmp_path / ".squeeze"
    assert settings.data == data
    assert settings.database_url == f"sqlite:///{data}/squeeze.db"
    assert settings.broker_url == f"redis+socket://{data}/broker.sock"
    assert settings.storage_url == f"file://{data}/storage"
    assert (settings.scratch, settings.cache) == (data / "scratch", data / "cache")
    assert (settings.host, settings.port, settings.model_roots) == ("127.0.0.1", 8000, ())
    assert (settings.lease_seconds, settings.max_attempts, settings.sweep_seconds) == (30, 3, 5)
    assert (settings.max_upload_bytes, settings.max_body_bytes) == (64 * 2**30, 2**20)
    assert (settings.worker_device, settings.vllm_python, settings.log_format) == ("auto", None, "json")


def test_every_variable_is_read() -> None:
    given = {
        "SQUEEZE_HOST": "0.0.0.0",
        "SQUEEZE_PORT": "9000",
        "SQUEEZE_DATA": "/data",
        "SQUEEZE_DATABASE_URL": "postgresql://u:p@h/d",
        "SQUEEZE_BROKER_URL": "redis://h:6379/1",
        "SQUEEZE_STORAGE_URL": "s3://bucket/prefix",
        "SQUEEZE_MODEL_ROOTS": "/models:/more",
        "SQUEEZE_MAX_UPLOAD_BYTES": "1000",
        "SQUEEZE_MAX_BODY_BYTES": "2048",
        "SQUEEZE_LEASE_SECONDS": "1.5",
        "SQUEEZE_MAX_ATTEMPTS": "5",
        "SQUEEZE_SWEEP_SECONDS": "0.5",
        "SQUEEZE_DEVICE": "cuda:1",
        "SQUEEZE_VLLM_PYTHON": "/opt/vllm/bin/python",
        "SQUEEZE_LLAMACPP_PYTHON": "/opt/llamacpp/bin/python",
        "SQUEEZE_ACTIVATION_BYTES": "1000000000",
        "SQUEEZE_CHECKPOINT_MINUTES": "2.5",
        "SQUEEZE_LOG_FORMAT": "console",
        "SQUEEZE_PUBLIC_URL": "https://squeeze.example/",
    }
    assert set(given) == set(VARIABLES)
    assert Settings.from_environment(given) == Settings(
        host="0.0.0.0",
        port=9000,
        data=Path("/data"),
        database_url="postgresql://u:p@h/d",
        broker_url="redis://h:6379/1",
        storage_url="s3://bucket/prefix",
        model_roots=(Path("/models"), Path("/more")),
        max_upload_bytes=1000,
        max_body_bytes=2048,
        lease_seconds=1.5,
        max_attempts=5,
        sweep_seconds=0.5,
        worker_device="cuda:1",
        vllm_python=Path("/opt/vllm/bin/python"),
        llamacpp_python=Path("/opt/llamacpp/bin/python"),
        activation_bytes=1_000_000_000,
        checkpoint_minutes=2.5,
        log_format="console",
        public_url="https://squeeze.example",
    )


@pytest.mark.parametrize(
    ("name", "value", "takes"),
    [
        ("PORT", "http", "whole number from 0 to 65535"),
        ("PORT", "65536", "whole number from 0 to 65535"),
        ("DATABASE_URL", "mysql://h/d", "postgresql://"),
        ("BROKER_URL", "amqp://h", "redis://"),
        ("STORAGE_URL", "/data", "file:///DIRECTORY"),
        ("MODEL_ROOTS", "models", "absolute directories"),
        ("MAX_UPLOAD_BYTES", "64G", "whole number"),
        ("MAX_BODY_BYTES", "0", "whole number"),
        ("LEASE_SECONDS", "nan", "seconds from 1 to 3600"),
        ("LEASE_SECONDS", "soon", "seconds from 1 to 3600"),
        ("SWEEP_SECONDS", "0", "seconds"),
        ("CHECKPOINT_MINUTES", "-1", "minutes from 0 to 1440"),
        ("MAX_ATTEMPTS", "0", "whole number"),
        ("DEVICE", "gpu", "cuda:N"),
        ("DEVICE", "cuda:", "cuda:N"),
        ("DEVICE", "cuda:0,", "cuda:N,M"),
        ("VLLM_PYTHON", "python", "absolute path"),
        ("LOG_FORMAT", "text", "`json` or `console`"),
        ("PUBLIC_URL", "squeeze.example", "https://"),
    ],
)
def test_a_bad_value_is_refused_by_name_with_what_it_takes(name: str, value: str, takes: str) -> None:
    with pytest.raises(SpecInvalid, match=takes) as caught:
        Settings.from_environment({f"SQUEEZE_{name}": value})
    assert caught.value.param == f"SQUEEZE_{name}"
    assert caught.value.message.startswith(f"SQUEEZE_{name} takes ")


def test_a_misspelt_variable_is_told_the_right_one() -> None:
    with pytest.raises(SpecInvalid, match="did you mean SQUEEZE_DATABASE_URL"):
        Settings.from_environment({"SQUEEZE_DATBASE_URL": "postgresql://h/d"})


def test_variables_of_others_are_left_alone() -> None:
    others = {"SQUEEZE_URL": "http://h", "SQUEEZE_API_KEY": "sq-x", "PORT": "x", "HF_TOKEN": "hf"}
    assert Settings.from_environment(others) == Settings.from_environment({})


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    assert Settings.from_environment({"SQUEEZE_PORT": "", "SQUEEZE_VLLM_PYTHON": ""}) == Settings.from_environment({})


def test_no_password_is_in_the_repr() -> None:
    settings = Settings.from_environment(
        {
            "SQUEEZE_DATABASE_URL": "postgresql://u:s3cret@h/d",
            "SQUEEZE_BROKER_URL": "redis://:s3cret@h/0",
            "SQUEEZE_STORAGE_URL": "s3://key:s3cret@bucket",
        }
    )
    assert "s3cret" not in repr(settings)
