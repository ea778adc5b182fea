"""`python -m api`: serves HTTP. Settings come from SQUEEZE_* variables."""

import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.auth import HOW_TO_MAKE_A_KEY, is_loopback
from jobs import keys, logs
from jobs.database import Database
from jobs.settings import Settings
from squeeze.errors import ServiceUnavailable, SqueezeError

SHUTDOWN_SECONDS = 10


class Server(uvicorn.Server):
    """Tells open streams of events that the end has come, which would otherwise keep the process alive."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        application = self.config.app
        if isinstance(application, FastAPI) and hasattr(application.state, "service"):
            application.state.service.stopping.set()
        super().handle_exit(sig, frame)


def refuse_open(settings: Settings) -> None:
    """Raises ServiceUnavailable where the service would be open to other machines."""
    if is_loopback(settings.host):
        return
    database = Database(settings.database_url)
    try:
        if database.is_sqlite:
            database.migrate()
        database.check()
        with database.read() as session:
            keyed = keys.any_active(session)
    finally:
        database.dispose()
    if not keyed:
        raise ServiceUnavailable(
            f"SQUEEZE_HOST={settings.host} is not loopback, and no API key exists: anybody could use the service. "
            f"Make a key first, with the same settings: {HOW_TO_MAKE_A_KEY}"
        )


def main() -> int:
    try:
        settings = Settings.from_environment()
        logs.configure(settings.log_format)
        refuse_open(settings)
    except SqueezeError as error:
        sys.stderr.write(f"{error.message}\n")
        return 2
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,  # our own logs
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    server = Server(config)
    server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
