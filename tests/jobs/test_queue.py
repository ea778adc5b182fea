"""The queue on a real broker: what a message says, in which order it comes, and a broker that is gone."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
from celery import Celery

from jobs import broker
from jobs.queue import QUEUES, celery_app, enqueue, queue_of, waiting
from squeeze.errors import ServiceUnavailable
from tests import servers
from tests.jobs.making import spec


@pytest.fixture
def app(broker_url: str) -> Iterator[Celery]:
    app = celery_app(broker_url)
    yield app
    app.close()


def _next_message(app: Celery, queue: str) -> tuple[dict[str, str], list[object]] | None:
    """Takes the most urgent message, as a worker would."""
    with app.connection_for_read() as connection:
        message = connection.default_channel.basic_get(queue, no_ack=True)
        if message is None:
            return None
        decoded = connection.default_channel.message_to_python(message) if isinstance(message, dict) else message
        return decoded.headers, decoded.decode()


def test_a_message_names_the_task_and_carries_the_id_alone(app: Celery) -> None:
    enqueue(app, "job-1", "gpu", 0)
    taken = _next_message(app, "gpu")
    assert taken is not None
    headers, body = taken
    assert (headers["task"], body[:2]) == ("squeeze.run", [["job-1"], {}])
    assert _next_message(app, "gpu") is None


def test_larger_priorities_come_first_and_equal_ones_in_order_of_arrival(app: Celery) -> None:
    sent = [("a", 0), ("b", -3), ("c", 6), ("d", 0), ("e", 5), ("f", 1)]
    for job_id, priority in sent:
        enqueue(app, job_id, "cpu", priority)
    taken = [_next_message(app, "cpu") for _ in sent]
    assert [message[1][0][0] for message in taken if message] == ["c", "e", "f", "a", "d", "b"]


def test_waiting_counts_the_messages_of_all_priorities(app: Celery) -> None:
    assert [waiting(app, queue) for queue in QUEUES] == [0, 0]
    for priority in (-3, 0, 6):
        enqueue(app, "job-1", "cpu", priority)
    assert [waiting(app, queue) for queue in QUEUES] == [3, 0]


def test_jobs_that_insist_on_a_gpu_wait_in_its_queue() -> None:
    assert queue_of(spec()) == "cpu"
    assert queue_of(spec(limits={"gpus": 1})) == "gpu"


def test_the_embedded_broker_keeps_messages_over_kill_9() -> None:
    with servers.short_directory() as data:
        first = broker.start(data)
        app = celery_app(broker.broker_url(data))
        enqueue(app, "job-1", "cpu", 0)
        first.kill()
        first.wait()
        second = broker.start(data)
        assert waiting(app, "cpu") == 1
        enqueue(app, "job-2", "cpu", 0)
        assert waiting(app, "cpu") == 2
        app.close()
        second.terminate()
        second.wait()


@pytest.mark.timeout(60)
def test_a_broker_that_is_down_is_unavailable(broker_kind: str) -> None:
    with _server(broker_kind) as (url, server):
        app = celery_app(url)
        enqueue(app, "job-1", "cpu", 0)
        server.kill()
        server.wait()
        for _ in range(2):
            with pytest.raises(ServiceUnavailable):
                enqueue(app, "job-2", "cpu", 0)
            with pytest.raises(ServiceUnavailable):
                waiting(app, "cpu")
        app.close()


@pytest.mark.timeout(60)
def test_a_broker_that_hangs_is_unavailable_and_serves_again_when_it_wakes(broker_kind: str) -> None:
    with _server(broker_kind) as (url, server):
        app = celery_app(url)
        enqueue(app, "job-1", "cpu", 0)
        server.send_signal(signal.SIGSTOP)
        with pytest.raises(ServiceUnavailable):
            enqueue(app, "job-2", "cpu", 0)
        with pytest.raises(ServiceUnavailable):
            waiting(app, "cpu")
        server.send_signal(signal.SIGCONT)
        enqueue(app, "job-3", "cpu", 0)
        assert waiting(app, "cpu") >= 2
        app.close()


def _server(kind: str) -> AbstractContextManager[tuple[str, "subprocess.Popen[bytes]"]]:
    return servers.valkey_server() if kind == "valkey" else servers.redis_server(str(shutil.which("redis-server")))


@pytest.fixture(params=["valkey", "redis"])
def broker_kind(request: pytest.FixtureRequest) -> str:
    if request.param == "redis" and shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    return str(request.param)
