"""Starts the whole service on one machine: `python scripts/serve.py`, or `make serve`.

Migrations, then the broker (an embedded server on a unix socket, unless SQUEEZE_BROKER_URL names another), the API, and
one worker per GPU or one on the CPU. A part that dies is started again. An interrupt stops what was started here; a
later start with the same SQUEEZE_DATA goes on where this one stopped.

Exit codes: 0 stopped as asked; 1 a part does not start; 2 refused, for the reason that is printed.
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.settings import Settings  # noqa: E402
from squeeze.errors import SqueezeError  # noqa: E402

TETHER = ROOT / "scripts" / "tether.py"
LOOK_SECONDS = 0.1
READY_SECONDS = 120.0
GRACE_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 60.0
DEATHS_BEFORE_READY = 4
REFUSES_TO_START = 2  # what our programs end with when their settings are wrong: another try would end the same


class Refused(Exception):
    """The service can't start; the message says why and what to do."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Part:
    """One program of the service, and how its present process fares."""

    name: str
    arguments: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    pause_seconds: float = FIRST_PAUSE_SECONDS
    start_at: float = 0.0
    deaths: int = 0

    def tend(self, environment: Mapping[str, str]) -> None:
        """Starts the part when it does not run; after a death only once a pause is over, longer for each death."""
        now = time.monotonic()
        if self.process is None:
            if now >= self.start_at:
                self._start(environment, now)
            return
        if not self.has_ended():
            return
        code = self.bury()
        if now - self.started_at > STEADY_SECONDS:
            self.pause_seconds = FIRST_PAUSE_SECONDS
        say(f"{self.name} ended with {code}; it starts again in {self.pause_seconds:g} s")
        self.deaths += DEATHS_BEFORE_READY if code == REFUSES_TO_START else 1
        self.start_at = now + self.pause_seconds
        self.pause_seconds = min(self.pause_seconds * 2, LONGEST_PAUSE_SECONDS)

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def bury(self) -> int | None:
        """Ends whatever is left of the process and its group; its exit status."""
        if self.process is None:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code, self.process = self.process.wait(), None
        return code

    def _start(self, environment: Mapping[str, str], now: float) -> None:
        tethered = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), sys.executable, *self.arguments]
        # A session of its own: an interrupt at the terminal reaches this launcher alone, which then stops in order.
        self.process = subprocess.Popen(
            tethered, cwd=ROOT, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True
        )
        self.started_at = now


def main() -> int:
    try:
        settings = Settings.from_environment()
        with only_launcher_of(settings.data):
            return serve(settings)
    except (Refused, SqueezeError) as refusal:
        say(str(refusal))
        return refusal.code if isinstance(refusal, Refused) else 2


@contextlib.contextmanager
def only_launcher_of(data: Path) -> Iterator[None]:
    """Holds the data directory; Refused when another launcher does. The kernel lets go of the lock when we die."""
    data.mkdir(parents=True, exist_ok=True)
    with (data / "launcher.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise Refused(
                f"A service already runs on {data} (process {holder}). Stop that one, or choose another directory: "
                "SQUEEZE_DATA=/some/where SQUEEZE_PORT=8001 make serve"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def serve(settings: Settings) -> int:
    """Runs the service until a signal asks for its end."""
    stopping, hurry = threading.Event(), threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        (hurry if stopping.is_set() else stopping).set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, on_signal)
    port = free_port(settings.host, settings.port)
    environment = {**os.environ, "SQUEEZE_PORT": str(port), "SQUEEZE_DATA": str(settings.data)}
    brokers = [] if os.environ.get("SQUEEZE_BROKER_URL") else [Part("broker", ["-m", "jobs", "broker"])]
    apis = [Part("api", ["-m", "api"])]
    workers = [
        Part(f"worker on {device}", ["-m", "workers", "--device", device])
        for device in devices(settings.worker_device, os.environ)
    ]
    try:
        for broker in brokers:
            broker.tend(environment)  # comes up while the database is migrated
        migrate(environment)
        for broker in brokers:
            wait_for_broker(settings.broker_url, broker, environment, stopping)
        tend([*brokers, *apis, *workers], environment, address(settings.host, port), stopping)
    finally:
        # Workers first, so that they can still hand their jobs back; the broker last.
        for parts in (workers, apis, brokers):
            stop(parts, hurry)
    say("Stopped. The same command goes on from here.")
    return 0


def free_port(host: str, port: int) -> int:
    """The port to listen on: the wanted one, or any free one for 0; Refused where another program has it."""
    deadline = time.monotonic() + 2.0  # what a killed launcher left may still be going
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return int(probe.getsockname()[1])
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Refused(
                        f"Can't listen on {host} port {port}: {error.strerror}. Choose another with "
                        "SQUEEZE_HOST and SQUEEZE_PORT, for example SQUEEZE_PORT=8001 make serve"
                    ) from None
        time.sleep(LOOK_SECONDS)


def devices(wanted: str, environ: Mapping[str, str]) -> list[str]:
    """One worker each: the device that was named, or every GPU, or the CPU. Counts GPUs without loading torch."""
    if wanted != "auto":
        return [wanted]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    else:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
            count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
        except (FileNotFoundError, subprocess.TimeoutExpired):
            count = len([*Path("/dev").glob("nvidia[0-9]*")])
    return [f"cuda:{number}" for number in range(count)] or ["cpu"]


def migrate(environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "jobs", "migrate"]
    if subprocess.run(command, cwd=ROOT, env=dict(environment), check=False).returncode != 0:
        raise Refused("The database could not be brought up to date (see above).", 1)


def wait_for_broker(url: str, broker: Part, environment: Mapping[str, str], stopping: threading.Event) -> None:
    """Returns once the embedded broker takes connections, so that nothing that follows starts with a failure."""
    path = unquote(urlsplit(url).path)
    while not stopping.is_set():
        broker.tend(environment)
        refuse_hopeless(broker)
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(path)
            return
        stopping.wait(LOOK_SECONDS)


def tend(parts: Sequence[Part], environment: Mapping[str, str], url: str, stopping: threading.Event) -> None:
    """Keeps every part running until a stop is asked for; says once that the service is ready."""
    begun, told = time.monotonic(), False
    while not stopping.is_set():
        for part in parts:
            part.tend(environment)
        if not told and answers(f"{url}/readyz"):
            told = True
            say(f"Squeeze is ready at {url} (manual at {url}/docs); stop it with Ctrl-C")
        elif not told:
            for part in parts:
                refuse_hopeless(part)
            if time.monotonic() - begun > READY_SECONDS:
                raise Refused(f"The service was not ready after {READY_SECONDS:g} s; the lines above say why.", 1)
        stopping.wait(LOOK_SECONDS)


def refuse_hopeless(part: Part) -> None:
    """Before the service was ever ready, a part that dies again and again will not come up by itself."""
    if part.deaths >= DEATHS_BEFORE_READY:
        raise Refused(f"The {part.name} does not start (see above).", 1)


def stop(parts: Sequence[Part], hurry: threading.Event) -> None:
    """Asks the parts to end, and ends them when the grace is over or a second signal came."""
    for part in parts:
        if part.process is not None and not part.has_ended():
            part.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and not all(part.has_ended() for part in parts):
        if hurry.wait(LOOK_SECONDS / 2):
            break
    for part in parts:
        part.bury()


def answers(url: str) -> bool:
    """Whether a GET answers 200; never by way of a proxy."""
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=5.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def address(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on `host`."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - looked up, not bound
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
