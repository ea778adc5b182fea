"""Celery's pool of threads, which also wakes Celery's loop when a job has ended.

Without prefetching the loop asks for a message only while the worker is free, and after a job it would notice that it
is free only when something else wakes it, up to a second later.
"""

from concurrent.futures import Future
from typing import Any

from celery.concurrency.thread import ApplyResult, TaskPool


class Pool(TaskPool):  # type: ignore[misc]
    """As Celery's own."""

    _loop: Any = None

    def register_with_event_loop(self, loop: Any) -> None:
        self._loop = loop

    def on_apply(self, *args: Any, **options: Any) -> ApplyResult:
        result = super().on_apply(*args, **options)
        result.f.add_done_callback(self._wake)
        return result

    def _wake(self, _done: "Future[Any]") -> None:
        if self._loop is not None:
            self._loop.call_soon(_look_again)


def _look_again() -> None:
    """The loop looks at the broker before it sleeps again, whatever it was woken for."""
