"""The texts that a job names, from wherever they are to files: looked up before the model is fetched, fetched after."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.texts.data import CHARACTERS_PER_TOKEN
from models.texts.generic import HELD_OUT_SHARE
from squeeze.errors import DataUnusable
from squeeze.names import OWN_ID
from squeeze.objects import Stage
from squeeze.specs.choosing import BATCH_TOKENS
from squeeze.specs.job_spec import JobSpec, hub_text
from squeeze.steps.training import Train
from storage import Storage
from workers import shards
from workers.channel import Teller
from workers.datasets import Dataset, resolve
from workers.request import Request
from workers.sources import uploaded

DATA, EVALUATION = "data.source", "evaluation.source"
EVERYTHING = 1 << 40  # sequences


@dataclass(frozen=True)
class Located:
    """A text on this disk. origin: what the report calls it, where the request's own words say too little."""

    path: Path
    origin: str | None = None


class Texts:
    """The job's two texts. Making one asks the Hub for every dataset that is named; nothing large is fetched yet."""

    def __init__(self, request: Request, spec: JobSpec, teller: Teller) -> None:
        self._request, self._spec, self._teller = request, spec, teller
        self._folder = request.scratch_path / "data"
        self._datasets: dict[str, Dataset] = {}
        teller.stage(Stage.pulling)
        for param, source in ((DATA, spec.data.source), (EVALUATION, spec.evaluation.source)):
            if (name := hub_text(source)) is not None:
                with _blamed(param):
                    note = self._folder / f"{_short(str(source))}.json"
                    self._datasets[param] = resolve(name, Path(request.cache), note)

    def fetch(self, storage: Storage) -> tuple[Located | None, Located | None]:
        """Calibration's and evaluation's; None for one that is in no file."""
        spec = self._spec
        data, evaluation = spec.data, spec.evaluation
        training = next((step for step in spec.steps if isinstance(step, Train)), None)
        calibrating = data.samples if any(step.needs_calibration for step in spec.steps) else 0
        evaluating = evaluation.samples if evaluation.perplexity or evaluation.divergence or training else 0
        held_out = HELD_OUT_SHARE * evaluating if evaluation.source is None else 0
        learned = 0 if training is None else _sequences(training, data.length)
        return (
            self._one(storage, DATA, data.source, data.column, max(calibrating, learned) + held_out),
            self._one(storage, EVALUATION, evaluation.source, evaluation.column, evaluating),
        )

    def _one(
        self, storage: Storage, param: str, source: str | None, column: str | None, sequences: int
    ) -> Located | None:
        if source is not None and OWN_ID.match(source):
            return Located(uploaded(self._request.data[source], self._folder, storage))
        dataset = self._datasets.get(param)
        if dataset is None or not sequences:
            return None
        wanted = sequences * self._spec.data.length * CHARACTERS_PER_TOKEN
        into = self._folder / _short(f"{source} {param}")
        with _blamed(param):
            path = shards.fetch(
                dataset,
                Path(self._request.cache),
                into,
                wanted,
                column,
                lambda done, total: self._teller.advance(done, total, "bytes"),
            )
        return Located(path, dataset.origin)


def _sequences(step: Train, length: int) -> int:
    """That a training looks at, at most; of epochs the whole of a dataset."""
    if step.steps is not None:
        return step.steps * (-(-BATCH_TOKENS // length) if step.batch_size == "auto" else step.batch_size)
    return EVERYTHING if step.tokens is None else -(-step.tokens // length)


@contextmanager
def _blamed(param: str) -> Iterator[None]:
    """Has an error of a text name the field that named the text."""
    try:
        yield
    except DataUnusable as error:
        error.param = param
        raise


def _short(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]
