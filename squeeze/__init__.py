"""Squeeze: make language models smaller, cheaper and faster.

This package holds the wire types, the client and the command line.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from squeeze.client import Client as Client

try:
    __version__ = version("squeeze-llm")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The client, on first use: whoever imports the wire types alone does not load an HTTP library."""
    if name == "Client":
        return import_module("squeeze.client").Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
