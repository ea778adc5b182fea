"""Kills everything at random while jobs run, then proves that each ended right, once: `make test-chaos`.

Starts the service from its real parts (broker, API, two workers) with short leases, runs one job of each recipe in
peace, then submits the rest by way of the client while `kill -9` takes children, certifiers, fork servers, workers, the
API and the broker at moments that a seed chooses. What the service does not start again by itself is started again
here, as an init system would. In the end the database and the storage are compared with what should be.

Exit codes: 0 everything held; 1 something did not, or not in time.
"""

import argparse
import math
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sqlalchemy import func, select  # noqa: E402

from jobs.database import Database  # noqa: E402
from jobs.records import JobRecord  # noqa: E402
from scripts.chaos_checks import Check, Life, checks, lives  # noqa: E402
from scripts.chaos_parts import Killer, Parts, belonging_to  # noqa: E402
from scripts.hub import Hub  # noqa: E402
from scripts.quickstart import service_environment  # noqa: E402
from squeeze import Client  # noqa: E402
from squeeze.errors import ConnectionFailed, ServiceUnavailable, SqueezeError  # noqa: E402
from squeeze.objects import FINAL  # noqa: E402
from storage import open_storage  # noqa: E402

SETTINGS = {
    "SQUEEZE_DEVICE": "cpu",
    "SQUEEZE_LEASE_SECONDS": "3",
    "SQUEEZE_SWEEP_SECONDS": "1",
    "SQUEEZE_MAX_ATTEMPTS": "100",  # dying this often is no fault of a job's here
    "OMP_NUM_THREADS": "1",
}
MODEL = "chaos/tiny"
MAKE_MODEL = """
import sys, torch
from pathlib import Path
from tests.models import tiny
tiny.llama(Path(sys.argv[1]), num_hidden_layers=4, dtype=torch.bfloat16)
"""
COMMON = {
    "model": MODEL,
    "data": {"samples": 16, "sequence_length": 128},
    "evaluation": {"perplexity": False, "divergence": False},
}
RECIPES = {
    "rtn 4 bits": {"steps": [{"kind": "quantize", "method": "rtn", "bits": 4}]},
    "gptq 4 bits": {"steps": [{"kind": "quantize", "method": "gptq", "bits": 4}]},
    "gptq 3 bits": {"steps": [{"kind": "quantize", "method": "gptq", "bits": 3, "group_size": 64}]},
    "rtn 8 bits": {"steps": [{"kind": "quantize", "method": "rtn", "bits": 8, "group_size": "channel"}]},
}
DISTURBED_SHARE = 0.15  # of the submits, during which the API is killed
TICK_SECONDS = 0.05
CLEAN_SECONDS = 30.0


class Stuck(RuntimeError):
    """It takes longer than it was given."""


@dataclass(eq=False)
class User(threading.Thread):
    """Submits one job after the other, repeats each call until it is answered and some even then, and looks at them.

    disturb: called shortly before the answer to a submit may come. unanswered: calls that had to be repeated.
    """

    url: str
    recipes: Mapping[str, str]
    dice: random.Random
    pause_seconds: float
    disturb: Callable[[], None] | None
    made: dict[str, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    unanswered: int = 0
    submitted: threading.Event = field(default_factory=threading.Event)
    leaving: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(name="user", daemon=True)

    def run(self) -> None:
        with Client(self.url, timeout_seconds=10.0, retries=0) as client:
            for key, recipe in self.recipes.items():
                job_id = self._submit(client, key, recipe)
                if job_id is not None and self.dice.random() < 0.3 and self._submit(client, key, recipe) != job_id:
                    self.complaints.append(f"{key} made a second job")
                self._watch(client, time.monotonic() + self.dice.uniform(0.0, 2.0) * self.pause_seconds)
            self.submitted.set()
            self._watch(client, math.inf)

    def leave(self) -> None:
        self.leaving.set()
        self.join()

    def _submit(self, client: Client, key: str, recipe: str) -> str | None:
        if self.disturb is not None and self.dice.random() < DISTURBED_SHARE:
            threading.Timer(self.dice.uniform(0.0, 0.05), self.disturb).start()
        while True:
            try:
                job = client.jobs.create({**COMMON, **RECIPES[recipe]}, idempotency_key=key)
            except (ConnectionFailed, ServiceUnavailable):
                self.unanswered += 1
                time.sleep(0.1)
            except SqueezeError as error:
                self.complaints.append(f"{key}: {error.code}: {error.message}")
                return None
            else:
                self.made[job.id] = recipe
                return job.id

    def _watch(self, client: Client, until: float) -> None:
        """Asks for jobs in the meantime: either the right answer comes, or none."""
        while time.monotonic() < until and not self.leaving.wait(0.2):
            if not self.made:
                continue
            asked = self.dice.choice([*self.made])
            try:
                if client.jobs.get(asked).id != asked:
                    self.complaints.append(f"{asked}: another job came back")
            except (ConnectionFailed, ServiceUnavailable):
                self.unanswered += 1
            except SqueezeError as error:
                self.complaints.append(f"{asked}: {error.code}: {error.message}")


@dataclass
class Trial:
    """One run: the service, and how long there is."""

    parts: Parts
    database: Database
    url: str
    dice: random.Random
    until: float
    refused: Counter[str] = field(default_factory=Counter)

    def tend(self) -> None:
        for part in self.parts.all:
            part.tend(self.dice)
            if part.refused is not None:
                self.refused[f"{part.name} ended by itself with {part.refused}"] += 1
                part.refused = None

    def keep(self, true: Callable[[], bool], what: str, killer: Killer | None = None) -> None:
        """Keeps everything running until it is so."""
        look_at = 0.0
        while True:
            self.tend()
            if killer is not None:
                killer.act(self.tend)
            if time.monotonic() >= look_at:
                if true():
                    return
                look_at = time.monotonic() + 0.5
            if time.monotonic() > self.until:
                raise Stuck(f"not in time: {what}")
            time.sleep(TICK_SECONDS)

    def serve(self, recipes: Mapping[str, str], pause_seconds: float, killer: Killer | None = None) -> User:
        """A user with all that was submitted, once all of it has ended."""
        dice = random.Random(self.dice.random())
        user = User(self.url, recipes, dice, pause_seconds, killer.kill_api if killer else None)
        user.start()
        self.keep(lambda: user.submitted.is_set() and self._ended(user), "every job ends", killer)
        user.leave()
        return user

    def _ended(self, user: User) -> bool:
        with self.database.read() as session:
            count = select(func.count()).where(JobRecord.id.in_(user.made), JobRecord.status.in_(FINAL))
            return session.scalar(count) == len(user.made)


def main() -> int:
    asked = arguments()
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    began = time.monotonic()
    with ExitStack() as stack:
        place = Path(asked.directory or stack.enter_context(tempfile.TemporaryDirectory(prefix="squeeze-")))
        data = place / "data"
        data.mkdir(parents=True)
        hub = stack.enter_context(Hub())
        hub.add(MODEL, make_model(place / "model"))
        environment = {**service_environment(data, hub.url), **SETTINGS}
        parts = Parts(environment, place)
        stack.callback(parts.stop)
        database = Database(f"sqlite:///{data}/squeeze.db")
        database.migrate()
        stack.callback(database.dispose)
        url = f"http://127.0.0.1:{environment['SQUEEZE_PORT']}"
        trial = Trial(parts, database, url, random.Random(seed), began + 60 * asked.minutes)
        say(f"seed {seed}, {asked.jobs} jobs")
        killer = Killer(parts, random.Random(seed + 1), data / "storage", asked.pause)
        try:
            held = run(trial, [*RECIPES][: asked.recipes], asked.jobs, killer, data)
        except Stuck as stuck:
            say(f"{stuck} ({asked.minutes:g} minutes); kills: {dict(killer.kills)}")
            show_unfinished(database)
            held = False
        say(f"{time.monotonic() - began:.0f} s, seed {seed}: {'everything held' if held else 'NOT everything held'}")
    return 0 if held else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument(
        "--recipes", type=int, default=len(RECIPES), help="how many kinds of job; each runs once in peace"
    )
    parser.add_argument("--seed", type=int, help="chooses the moments; by default another one each time")
    parser.add_argument("--pause", type=float, default=6.0, help="mean seconds between two kills")
    parser.add_argument("--minutes", type=float, default=14.5, help="longer than this is a failure")
    parser.add_argument("--directory", help="a short path; data and logs stay there (by default they go)")
    return parser.parse_args()


def make_model(directory: Path) -> Path:
    """In a process of its own, so that this one needs no torch."""
    command = [sys.executable, "-c", MAKE_MODEL, str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return directory


def run(trial: Trial, names: list[str], count: int, killer: Killer, data: Path) -> bool:
    began = time.monotonic()
    calm = trial.serve({f"calm-{name}": name for name in names}, 0.0)
    seconds = (time.monotonic() - began) / len(names)
    say(f"undisturbed: {seconds:.1f} s a job; now with kills")
    began = time.monotonic()
    user = trial.serve({f"chaos-{n}": names[n % len(names)] for n in range(count)}, seconds / 2, killer)
    say(f"disturbed: {(time.monotonic() - began) / count:.1f} s a job; now the last look")
    for worker in trial.parts.workers:  # what a killed worker left, the next one clears away when it starts
        worker.stop()
    cleared = time.monotonic() + CLEAN_SECONDS
    trial.keep(lambda: time.monotonic() > cleared or not [*(data / "scratch").glob("job-*")], "workers clear up")
    trial.parts.stop()
    storage = open_storage((data / "storage").as_uri())
    found = lives(trial.database, storage)
    of_recipe = {recipe: found[job_id] for job_id, recipe in calm.made.items()}
    results = checks(found, user.made, of_recipe, storage, data / "scratch")
    results += [
        Check("every call was answered as it should be, or not at all", count, [*calm.complaints, *user.complaints]),
        Check("no part ended that was not killed", sum(killer.kills.values()), [*trial.refused]),
        Check("no process is left", len(trial.parts.all), [str(pid) for pid in belonging_to(data)]),
    ]
    show(results, killer, user, [found[job_id] for job_id in user.made if job_id in found])
    return not any(result.broken for result in results)


def show(results: list[Check], killer: Killer, user: User, disturbed: list[Life]) -> None:
    say("\nkilled with SIGKILL")
    for kind, number in sorted(killer.kills.items()):
        say(f"  {number:4}  {kind}")
    say(f"  {sum(killer.kills.values()):4}  together, {killer.aimed} of them while a result was being stored")
    attempts = Counter(life.job.attempt for life in disturbed)
    say("\nattempts a job took: " + ", ".join(f"{number} × {tries}" for tries, number in sorted(attempts.items())))
    say(f"calls that had to be repeated: {user.unanswered}\n")
    for result in results:
        say(f"  {'BROKEN' if result.broken else 'holds '}  {result.holds} ({result.looked})")
        for broken in result.broken[:10]:
            say(f"            {broken}")
    say("")


def show_unfinished(database: Database) -> None:
    with database.read() as session:
        for job in session.scalars(select(JobRecord).where(JobRecord.status.not_in(FINAL))):
            say(f"  {job.id} {job.status} attempt {job.attempt} worker {job.worker} stage {job.stage}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
