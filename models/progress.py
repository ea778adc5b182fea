"""How long work in this room tells the outside where it stands; the outside decides what to do with it."""

from typing import Any, Protocol

from squeeze.objects import Stage


class Notify(Protocol):
    """Takes what the work tells. Every method returns at once."""

    def stage(self, stage: Stage) -> None:
        """The work enters a stage."""

    def advance(self, done: int, total: int, unit: str) -> None:
        """`done` of `total` units (blocks, bytes, files) of the present stage are done."""

    def event(self, kind: str, message: str, **data: Any) -> None:
        """Something that the user should read: kind `info` or `warning`, JSON-able data."""


class Silent:
    """Tells nobody."""

    def stage(self, stage: Stage) -> None:
        pass

    def advance(self, done: int, total: int, unit: str) -> None:
        pass

    def event(self, kind: str, message: str, **data: Any) -> None:
        pass
