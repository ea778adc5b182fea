"""How long work in this room tells the outside where it stands; the outside decides what to do with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from squeeze.objects import Stage


class Notify(Protocol):
    """Takes what the work tells. Every method returns at once."""

    def expect(self, work: Mapping[str, float]) -> None:
        """What there is to do: operations by stage, as `squeeze.costs.work` counts them. Told as soon as that is
        known, and anew by a step that knows it better.
        """

    def stage(self, stage: Stage) -> None:
        """The work enters a stage."""

    def advance(self, done: int, total: int, unit: str) -> None:
        """`done` of `total` units (blocks, bytes, files) of the present stage are done."""

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Something that the user should read: kind `info` or `warning`, JSON-able data."""

    def kept(self, checkpoint: Path) -> None:
        """A directory with all that a training needs to go on, until the next one is kept in its place."""


class Silent:
    """Tells nobody."""

    def expect(self, work: Mapping[str, float]) -> None:
        pass

    def stage(self, stage: Stage) -> None:
        pass

    def advance(self, done: int, total: int, unit: str) -> None:
        pass

    def event(self, kind: str, message: str, **data: Any) -> None:
        pass

    def kept(self, checkpoint: Path) -> None:
        pass
