"""DéjàVu: the client library and the command line.

`async with AsyncClient() as client:`, then `async for token in client.stream("Once upon a time"):`.
`Client` is the same without an event loop.
"""

from importlib import metadata

from dejavu.client import AsyncClient
from dejavu.errors import DejavuError
from dejavu.params import SamplingParams
from dejavu.sync_client import Client
from dejavu.types import Choice, Completion, Token, Usage

try:
    __version__ = metadata.version("dejavu-serve")
except metadata.PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+checkout"

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
