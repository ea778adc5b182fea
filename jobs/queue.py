"""The queue: a bell that tells workers to look at a job. It carries ids alone, and may lose them."""

from typing import Literal

from celery import Celery
from kombu import Connection
from kombu.exceptions import OperationalError
from kombu.pools import producers

from squeeze.errors import ServiceUnavailable
from squeeze.specs.job_spec import JobSpec

TASK = "squeeze.run"
Queue = Literal["cpu", "gpu"]
QUEUES: tuple[Queue, ...] = ("cpu", "gpu")

_MOST_URGENT = 6  # of a spec's priorities; Redis calls it 0 and counts up as urgency falls
_ANSWER_SECONDS = 1.0


def celery_app(broker_url: str) -> Celery:
    """The Celery application of both ends: the API sends through it, workers listen with it."""
    app = Celery("squeeze", broker=broker_url, set_as_current=False)
    app.conf.update(
        # The database owns a job from the moment that a worker claims it, so the message is done on arrival. Late
        # acknowledgement would redeliver every job that runs longer than the visibility timeout.
        task_acks_late=False,
        # A reserved message behind a day-long job would wait a day while another worker idles.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        task_ignore_result=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        task_default_queue="cpu",
        task_create_missing_queues=True,
        task_serializer="json",
        accept_content=["json"],
        broker_transport_options={"priority_steps": list(range(10)), "queue_order_strategy": "priority"},
    )
    return app


def queue_of(spec: JobSpec) -> Queue:
    """The class of worker that may run the job."""
    return "gpu" if spec.limits.gpus else "cpu"


def enqueue(app: Celery, job_id: str, queue: str, priority: int) -> None:
    """Rings for a job whose transaction is committed.

    Raises ServiceUnavailable, within some two seconds, where the broker does not answer; the caller may go on, for
    the sweep rings again.
    """
    try:
        with producers[_impatient(app)].acquire(block=True, timeout=_ANSWER_SECONDS) as producer:
            app.send_task(
                TASK, args=[job_id], queue=queue, priority=_MOST_URGENT - priority, producer=producer, retry=False
            )
    except _failures(app) as error:
        raise ServiceUnavailable("The queue does not answer; the job is kept and will be sent later.") from error


def waiting(app: Celery, queue: str) -> int:
    """Messages that no worker has taken yet. Raises ServiceUnavailable where the broker does not answer."""
    try:
        with producers[_impatient(app)].acquire(block=True, timeout=_ANSWER_SECONDS) as producer:
            return int(producer.channel.queue_declare(queue=queue).message_count)
    except _failures(app) as error:
        raise ServiceUnavailable("The queue does not answer.") from error


def _impatient(app: Celery) -> Connection:
    """The broker as a request sees it: one try, a second to connect, a second to answer.

    A worker's own connection waits and reconnects for as long as it takes, so it can't share these options.
    """
    connection: Connection = app.connection_for_write(
        connect_timeout=_ANSWER_SECONDS,
        transport_options={
            **app.conf.broker_transport_options,
            "max_retries": 0,
            "connect_retries_timeout": _ANSWER_SECONDS,
            "socket_timeout": _ANSWER_SECONDS,
            "socket_connect_timeout": _ANSWER_SECONDS,
        },
    )
    return connection


def _failures(app: Celery) -> tuple[type[BaseException], ...]:
    """What a broker that is down, stopped or out of connections raises."""
    connection = app.connection_for_write()
    return (OperationalError, *connection.connection_errors, *connection.channel_errors)
