"""What the processes of a race do. They fork from a server that has imported this file, so a dozen start in no time."""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from typing import Any

from jobs import lifecycle
from jobs.database import Database

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload([__name__])


def race(run: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Runs the function in one process for each tuple of arguments, at once; its answers."""
    context: ForkServerContext = _forkserver
    together = context.Barrier(len(arguments))
    pipes = [context.Pipe(duplex=False) for _ in arguments]
    processes = [
        context.Process(target=_run, args=(run, given, together, sender))
        for given, (_, sender) in zip(arguments, pipes, strict=True)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()  # the process holds its own; a death then reads as the end of the pipe
    answers = [receiver.recv() for receiver, _ in pipes]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return answers


def migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.check()
    database.dispose()


def claim_all(url: str, job_ids: Sequence[str], worker: str) -> list[str]:
    """The jobs that this worker got of those that all workers want."""
    database = Database(url)
    got = []
    for job_id in job_ids:
        with database.write() as session:
            if lifecycle.claim(session, job_id, worker=worker, lease_seconds=60) is not None:
                got.append(job_id)
    database.dispose()
    return got


def _run(run: Callable[..., Any], given: tuple[Any, ...], together: Any, sender: Any) -> None:
    together.wait()
    sender.send(run(*given))
    sender.close()
