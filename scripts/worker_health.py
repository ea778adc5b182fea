"""Does the worker of this host take jobs? `python -m scripts.worker_health` exits 0 if it answers through the broker.

For the container's health check: the answer comes from the worker's own loop, and also while a job runs.
"""

import socket
import sys

from jobs.queue import celery_app
from jobs.settings import Settings

ANSWER_SECONDS = 5.0


def main() -> int:
    app = celery_app(Settings.from_environment().broker_url)
    answers: list[dict[str, object]] = app.control.ping(timeout=ANSWER_SECONDS) or []
    return 0 if any(node.endswith(f"@{socket.gethostname()}") for answer in answers for node in answer) else 1


if __name__ == "__main__":
    sys.exit(main())
