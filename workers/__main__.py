"""Starts a worker: `python -m workers [--device cpu|cuda:0|cuda:0,1|auto] [--queues cpu,gpu] [--name NAME]`.

One job at a time, so one worker for each GPU, or one for those that jobs are to share. It starts, keeps running and
connects again while the broker or the database is down.
"""

import argparse
import os
import re
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Any

import structlog
from celery.worker import state

from jobs import logs
from jobs.database import Database
from jobs.queue import QUEUES, TASK, celery_app
from jobs.settings import Settings
from squeeze.errors import SqueezeError
from storage import open_storage
from workers.forkserver import DEFAULT_ENTRY
from workers.groups import Ledger, NameTaken
from workers.pool import Pool
from workers.processors import resolve_device
from workers.spawn import ForkServer
from workers.worker import Worker, safe_name

LEDGERS = "workers"  # folder in the scratch directory, where no job's id can be

log = structlog.get_logger("workers")


def main() -> int:
    options = _options()
    try:
        settings = Settings.from_environment()
    except SqueezeError as error:
        sys.stderr.write(f"{error.message}\n")
        return 2
    logs.configure(settings.log_format)
    device = resolve_device(options.device or settings.worker_device)
    queues = options.queues.split(",") if options.queues else ["cpu"] if device == "cpu" else ["gpu", "cpu"]
    unknown = set(queues) - set(QUEUES)
    if unknown:
        sys.stderr.write(f"there is no queue {', '.join(sorted(unknown))}; there are {', '.join(QUEUES)}\n")
        return 2
    try:
        ledger = _ledger(settings, safe_name(options.name or f"{socket.gethostname()}-{device}"), options.name is None)
    except NameTaken as taken:
        sys.stderr.write(f"a worker named {taken} already runs on {settings.data}; give this one another --name\n")
        return 2
    server = ForkServer(ledger, options.entry)
    worker = Worker(
        settings,
        app=celery_app(settings.broker_url),
        database=Database(settings.database_url),
        storage=open_storage(settings.storage_url),
        ledger=ledger,
        server=server,
        name=ledger.name,
        device=device,
    )
    log.info("worker starts", name=worker.name, device=device, queues=queues, pid=os.getpid())
    try:
        server.start()
        return _serve(worker, queues)
    finally:
        worker.stopping.set()
        server.close()
        ledger.close()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m workers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", type=_device, help="cpu, cuda:N, cuda:N,M… or auto (the default; SQUEEZE_DEVICE sets another)"
    )
    parser.add_argument("--queues", help="comma-separated; by default cpu, and gpu before it where the device is one")
    parser.add_argument("--name", help="unique on the data directory; by default made of host and device")
    parser.add_argument("--entry", default=DEFAULT_ENTRY, help=argparse.SUPPRESS)
    return parser.parse_args()


def _device(text: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda:\d+(,\d+)*", text) is None:
        raise argparse.ArgumentTypeError("take cpu, cuda:N, cuda:N,M… or auto")
    return text


def _ledger(settings: Settings, name: str, or_like_it: bool) -> Ledger:
    """The worker's own, under its name; or_like_it: or under the first free one that starts the same."""
    folder = settings.scratch / LEDGERS
    for number in range(1, 1000):
        try:
            return Ledger(folder, name if number == 1 else f"{name}-{number}")
        except NameTaken:
            if not or_like_it:
                raise
    raise NameTaken(name)


def _serve(worker: Worker, queues: list[str]) -> int:
    """Celery's loop in this thread until a signal ends it; jobs in its pool's one thread, the sweep in another."""
    app = worker.app
    app.task(name=TASK)(_task(worker))

    def stop(_number: int, _frame: FrameType | None) -> None:
        worker.stopping.set()
        state.should_stop = os.EX_OK  # where Celery's loop looks

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    sweep = threading.Thread(target=worker.sweep_forever, name="sweep")
    sweep.start()
    # Celery's program, `app.Worker`, would print a banner and set up signals and logs of its own.
    node = app.WorkController(
        hostname=f"{worker.name}@{socket.gethostname()}",
        pool=Pool,
        concurrency=1,
        queues=queues,
        without_gossip=True,
        without_mingle=True,
        ready_callback=lambda _consumer: log.info("worker is ready", name=worker.name),
    )
    node.start()
    worker.stopping.set()
    sweep.join()
    return int(node.exitcode or 0)


def _task(worker: Worker) -> Any:
    def run(job_id: str) -> None:
        worker.run_job(job_id)

    return run


if __name__ == "__main__":
    sys.exit(main())
