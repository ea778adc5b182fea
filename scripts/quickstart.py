"""The whole trip on one machine with no network: `make quickstart`.

Serves the bundled model as a Hub would, starts the service on a free port with a fresh data directory, quantizes the
model to 4 bits by GPTQ through the real command line, prints the report's headline and what the downloaded model
writes, and stops what it started.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402

from scripts.serve import TETHER, address  # noqa: E402

READY_SECONDS = 180.0
STOP_SECONDS = 30.0
HUB = ["scripts/hub.py", "--repo", f"squeeze/bundled={ROOT / 'models' / 'bundled'}", "--port", "0"]
HUB_URL = re.compile(r"http://[\w.:\[\]-]+")
PROMPT = "def read(self, size=-1):\n"
SAMPLE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory)
ids = tokenizer(prompt, return_tensors="pt")
out = model.generate(**ids, max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""


def main() -> int:
    asked = arguments()
    took: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        workplace = Path(asked.directory or tempfile.mkdtemp(prefix="squeeze-"))
        workplace.mkdir(parents=True, exist_ok=True)
        out = workplace / "result"
        with timed(took, "start"):
            hub = stack.enter_context(running(HUB, dict(os.environ), workplace / "hub.log"))
            hub_url = first_url(hub, workplace / "hub.log")
            environment = service_environment(workplace / "data", hub_url)
            service = stack.enter_context(running(["scripts/serve.py"], environment, workplace / "service.log"))
            url = address("127.0.0.1", int(environment["SQUEEZE_PORT"]))
            wait_until_ready(url, service, workplace / "service.log")
        say(f"The service answers at {url}; a stand-in Hub serves the bundled model at {hub_url}.\n")
        environment["SQUEEZE_URL"] = url
        command = ["quantize", "squeeze/bundled", "--method", "gptq", "--bits", "4", "--wait", "--download", str(out)]
        with timed(took, "job and download"):
            say("$ squeeze " + " ".join(command))
            squeeze(command, environment)
        job_id = json.loads(squeeze(["jobs", "--limit", "1", "--json"], environment, capture=True))["id"]
        say(f"\n$ squeeze report {job_id}")
        squeeze(["report", job_id], environment)
        with timed(took, "sample"):
            show_sample(out / "compressed-tensors")
        with timed(took, "stop"):
            stack.close()
    if asked.directory is None:  # after a failure it stays, with the logs
        shutil.rmtree(workplace)
        say("\nAll of it was in a temporary directory and is gone; --directory DIR keeps it. Your own: make serve")
    say("\nSeconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in took.items()))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compresses the bundled model, over HTTP, with no network.")
    parser.add_argument("--directory", help="keep everything here (by default a temporary directory, then removed)")
    return parser.parse_args()


@contextlib.contextmanager
def timed(took: dict[str, float], name: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    took[name] = time.monotonic() - begun


@contextlib.contextmanager
def running(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One of our scripts in the background, its output in a file; stopped in the end, and with us whatever happens."""
    tethered = [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), sys.executable, "-u", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            tethered,
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def first_url(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that a script prints when it listens."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := HUB_URL.search(log.read_text()):
            return found.group()
        time.sleep(0.05)
    raise SystemExit(f"The stand-in Hub did not start:\n{log.read_text()}")


def service_environment(data: Path, hub_url: str) -> dict[str, str]:
    """A service of its own: no setting of the machine's other services leaks in."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEEZE_", "HF_"))}
    kept = {
        name: os.environ[name]
        for name in ("SQUEEZE_DEVICE", "SQUEEZE_VLLM_PYTHON", "SQUEEZE_LLAMACPP_PYTHON")
        if name in os.environ
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    unproxied = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1,localhost")))
    return {
        **inherited,
        **kept,
        "SQUEEZE_DATA": str(data),
        "SQUEEZE_PORT": str(port),
        "HF_ENDPOINT": hub_url,
        "NO_PROXY": unproxied,
        "no_proxy": unproxied,
    }


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    with httpx.Client(trust_env=False) as http:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if http.get(f"{url}/readyz").is_success:
                    return
            time.sleep(0.1)
    raise SystemExit(f"The service did not become ready:\n{log.read_text()}")


def squeeze(arguments: Sequence[str], environment: Mapping[str, str], *, capture: bool = False) -> str:
    """The real command line, as a user would run it."""
    command = [sys.executable, "-m", "squeeze.cli", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(environment), check=False, text=True, stdout=subprocess.PIPE if capture else None
    )
    if done.returncode != 0:
        data = environment["SQUEEZE_DATA"]
        raise SystemExit(f"squeeze {arguments[0]} ended with {done.returncode}; service.log is beside {data}")
    return done.stdout or ""


def show_sample(directory: Path) -> None:
    """What the downloaded model writes, in a process that knows nothing but the directory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-W", "ignore", "-c", SAMPLE, str(directory), PROMPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"The downloaded model did not load:\n{done.stderr}")
    say(f"\nThe downloaded model, in a fresh process, goes on after {PROMPT.strip()!r}:\n")
    say("\n".join("    " + line for line in done.stdout.rstrip().splitlines()))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
