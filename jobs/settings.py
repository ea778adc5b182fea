"""The service's settings: `SQUEEZE_*` environment variables, read once at start, frozen afterwards."""

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, Self, TypeVar, cast
from urllib.parse import quote

from squeeze.errors import SpecInvalid

PREFIX = "SQUEEZE_"
LogFormat = Literal["json", "console"]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Settings:
    """What the operator chose. URLs may hold passwords, so they stay out of `repr` and thereby out of logs."""

    data: Path
    database_url: str = field(repr=False)
    broker_url: str = field(repr=False)
    storage_url: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 8000
    model_roots: tuple[Path, ...] = ()
    max_upload_bytes: int = 64 * 2**30
    max_body_bytes: int = 2**20
    lease_seconds: float = 30.0
    max_attempts: int = 3
    sweep_seconds: float = 5.0
    worker_device: str = "auto"
    vllm_python: Path | None = None
    llamacpp_python: Path | None = None
    activation_bytes: int | None = None
    checkpoint_minutes: float = 15.0
    log_format: LogFormat = "json"
    public_url: str | None = None

    @property
    def scratch(self) -> Path:
        """Work directories of jobs, one a job, kept between attempts."""
        return self.data / "scratch"

    @property
    def consumers(self) -> dict[str, Path]:
        """Pythons of the environments that results are loaded in, by the consumer's name."""
        named = {"vllm": self.vllm_python, "llama.cpp": self.llamacpp_python}
        return {name: python for name, python in named.items() if python is not None}

    @property
    def cache(self) -> Path:
        """What was pulled from the Hub, shared by all jobs."""
        return self.data / "cache"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """The settings that the variables ask for; raises SpecInvalid, which names the variable and what it takes."""
        _refuse_misspelt(environ)
        # An empty value means "not set", as in `SQUEEZE_VLLM_PYTHON= squeeze up` or a blank line of a compose file.
        given = {name.removeprefix(PREFIX): text for name, text in environ.items() if name.startswith(PREFIX) and text}

        def take(name: str, default: _Value, parse: Callable[[str, str], _Value]) -> _Value:
            return parse(PREFIX + name, given[name]) if name in given else default

        data = Path(os.path.abspath(Path(given.get("DATA", ".squeeze")).expanduser()))  # noqa: PTH100 (links stay links)
        return cls(
            data=data,
            database_url=take("DATABASE_URL", f"sqlite:///{data}/squeeze.db", _database_url),
            broker_url=take("BROKER_URL", f"redis+socket://{quote(str(data))}/broker.sock", _broker_url),
            storage_url=take("STORAGE_URL", (data / "storage").as_uri(), _storage_url),
            host=given.get("HOST", cls.host),
            port=take("PORT", cls.port, _whole(0, 65535)),
            model_roots=take("MODEL_ROOTS", cls.model_roots, _directories),
            max_upload_bytes=take("MAX_UPLOAD_BYTES", cls.max_upload_bytes, _whole(1, 2**63 - 1)),
            max_body_bytes=take("MAX_BODY_BYTES", cls.max_body_bytes, _whole(1024, 2**31)),
            lease_seconds=take("LEASE_SECONDS", cls.lease_seconds, _seconds(1.0, 3600.0)),
            max_attempts=take("MAX_ATTEMPTS", cls.max_attempts, _whole(1, 100)),
            sweep_seconds=take("SWEEP_SECONDS", cls.sweep_seconds, _seconds(0.1, 3600.0)),
            worker_device=take("DEVICE", cls.worker_device, _device),
            vllm_python=take("VLLM_PYTHON", cls.vllm_python, _program),
            llamacpp_python=take("LLAMACPP_PYTHON", cls.llamacpp_python, _program),
            activation_bytes=take("ACTIVATION_BYTES", cls.activation_bytes, _whole(0, 2**63 - 1)),
            checkpoint_minutes=take("CHECKPOINT_MINUTES", cls.checkpoint_minutes, _minutes(0.0, 1440.0)),
            log_format=take("LOG_FORMAT", cls.log_format, _log_format),
            public_url=take("PUBLIC_URL", cls.public_url, _public_url),
        )


VARIABLES = tuple(
    PREFIX + ("DEVICE" if each.name == "worker_device" else each.name.upper()) for each in fields(Settings)
)


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    """A misspelt variable would be ignored in silence, and the service would run on a database nobody meant."""
    bare = [name.removeprefix(PREFIX) for name in VARIABLES]
    for name in environ:
        if not name.startswith(PREFIX) or name in VARIABLES:
            continue
        near = difflib.get_close_matches(name.removeprefix(PREFIX), bare, n=1, cutoff=0.85)
        if near:
            raise SpecInvalid(f"{name} is not a setting; did you mean {PREFIX}{near[0]}?", param=name)


def _refuse(name: str, takes: str) -> SpecInvalid:
    return SpecInvalid(f"{name} takes {takes}; correct it or unset it.", param=name)


def _whole(least: int, most: int) -> Callable[[str, str], int]:
    def parse(name: str, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _refuse(name, f"a whole number from {least} to {most}") from None
        if not least <= value <= most:
            raise _refuse(name, f"a whole number from {least} to {most}")
        return value

    return parse


def _seconds(least: float, most: float) -> Callable[[str, str], float]:
    return _between(least, most, "seconds")


def _minutes(least: float, most: float) -> Callable[[str, str], float]:
    return _between(least, most, "minutes")


def _between(least: float, most: float, unit: str) -> Callable[[str, str], float]:
    def parse(name: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _refuse(name, f"{unit} from {least:g} to {most:g}") from None
        if not least <= value <= most:  # NaN fails too
            raise _refuse(name, f"{unit} from {least:g} to {most:g}")
        return value

    return parse


def _directories(name: str, text: str) -> tuple[Path, ...]:
    roots = tuple(Path(part) for part in text.split(os.pathsep) if part)
    if not all(root.is_absolute() for root in roots):
        raise _refuse(name, f"absolute directories separated by `{os.pathsep}`")
    return roots


def _program(name: str, text: str) -> Path:
    path = Path(text)
    if not path.is_absolute():
        raise _refuse(name, "the absolute path of a Python interpreter that has vLLM")
    return path


def _device(name: str, text: str) -> str:
    numbers = text.removeprefix("cuda:")
    if text in ("auto", "cpu") or (numbers != text and all(number.isdecimal() for number in numbers.split(","))):
        return text
    raise _refuse(name, "`auto`, `cpu`, `cuda:N` or, for jobs that share several GPUs, `cuda:N,M`")


def _log_format(name: str, text: str) -> LogFormat:
    if text not in ("json", "console"):
        raise _refuse(name, "`json` or `console`")
    return cast(LogFormat, text)


def _public_url(name: str, text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise _refuse(name, "the http:// or https:// address under which users reach the service")
    return text.rstrip("/")


def _database_url(name: str, text: str) -> str:
    if not text.startswith(("sqlite:///", "postgresql://", "postgresql+psycopg://", "postgres://")):
        raise _refuse(name, "sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE")
    return text


def _broker_url(name: str, text: str) -> str:
    if not text.startswith(("redis://", "rediss://", "redis+socket://")):
        raise _refuse(name, "redis://HOST:PORT/0, rediss://HOST:PORT/0 or redis+socket:///PATH")
    return text


def _storage_url(name: str, text: str) -> str:
    if not text.startswith(("file:///", "s3://")):
        raise _refuse(name, "file:///DIRECTORY or s3://BUCKET/PREFIX")
    return text
