"""DéjàVu: the client library and the command line.

`async with AsyncClient() as client:`, then `async for token in client.stream("Once upon a time"):`.
`Client` is the same without an event loop.
"""

# Nothing is imported before it is asked for: all of it takes a third of a second, in which nobody could end the
# command line quietly.
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dejavu.client import AsyncClient
    from dejavu.errors import DejavuError
    from dejavu.params import SamplingParams
    from dejavu.sync_client import Client
    from dejavu.types import Choice, Completion, Token, Usage

    __version__: str
else:

    def __getattr__(name: str) -> object:
        import importlib

        if name == "__version__":
            return _version()
        if name not in _HOMES:
            raise AttributeError(f"module 'dejavu' has no attribute {name!r}")
        return getattr(importlib.import_module(f"dejavu.{_HOMES[name]}"), name)


__all__ = [
    "AsyncClient",
    "Choice",
    "Client",
    "Completion",
    "DejavuError",
    "SamplingParams",
    "Token",
    "Usage",
    "__version__",
]

_HOMES = {
    "AsyncClient": "client",
    "Choice": "types",
    "Client": "sync_client",
    "Completion": "types",
    "DejavuError": "errors",
    "SamplingParams": "params",
    "Token": "types",
    "Usage": "types",
}


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("dejavu-serve")
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        return "0+checkout"
