"""Where clients look for routers, and which router to try next."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dejavu.errors import ConfigurationError, InvalidParameter

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5555"
DEFAULT_STATE_DIR = "~/.local/state/dejavu"
ENDPOINTS_FILE = "endpoints"
_FORM = re.compile(r"tcp://\S+:(?P<port>\d{1,9})|ipc://\S+")


def state_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """`DEJAVU_STATE_DIR`, or the directory that `dejavu serve` uses by default. Raises `ConfigurationError` where there
    is no home."""
    try:
        return Path(environment.get("DEJAVU_STATE_DIR") or DEFAULT_STATE_DIR).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(f"{error} Set DEJAVU_STATE_DIR", field="state_dir") from error


def find_endpoints(endpoint: str | Sequence[str] | None, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The routers to try: the given ones, else `DEJAVU_ENDPOINT` (comma list), else those that a running
    `serve` left in its state directory, else the default port. Raises `InvalidParameter` for what is none,
    `ConfigurationError` for a state directory that cannot be read."""
    given = endpoint if endpoint is not None else environment.get("DEJAVU_ENDPOINT") or _recorded(environment)
    parts = given.split(",") if isinstance(given, str) else given
    if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
        raise InvalidParameter("must be a string or a sequence of strings", field="endpoint")
    endpoints = list(dict.fromkeys(part.strip() for part in parts if part.strip()))
    if not endpoints and endpoint is not None:
        raise InvalidParameter("is empty", field="endpoint")
    endpoints = endpoints or [DEFAULT_ENDPOINT]
    for candidate in endpoints:
        form = _FORM.fullmatch(candidate)
        if form is None or not 0 < int(form["port"] or 1) <= 65535:
            raise InvalidParameter(f"{candidate!r} is not of the form tcp://HOST:PORT", field="endpoint")
    return endpoints


def _recorded(environment: Mapping[str, str]) -> list[str]:
    file = state_dir(environment) / ENDPOINTS_FILE
    try:
        return file.read_text().split()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}", field="state_dir") from error


class RouterList:
    """Which router to try next (pure): the preferred one, else the one that was tried longest ago."""

    def __init__(self, configured: Sequence[str]) -> None:
        self._configured = list(configured)
        self._queue = list(configured)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[str]:
        return iter(self._queue)

    def next(self) -> str:
        endpoint = self._queue.pop(0)
        self._queue.append(endpoint)
        return endpoint

    def prefer(self, endpoint: str) -> None:
        """To be tried next, whether it was known or not."""
        self._queue = [endpoint, *(known for known in self._queue if known != endpoint)]

    def learn(self, routers: Iterable[str]) -> None:
        """A router told which routers there are; the configured ones stay, others are forgotten."""
        current = dict.fromkeys([*self._configured, *routers])
        kept = [known for known in self._queue if known in current]
        self._queue = [*(new for new in current if new not in kept), *kept]
