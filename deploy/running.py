"""A system for as long as a block of code lasts: `dejavu serve` as a user would type it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

START_LIMIT_S = 180.0
MAX_LOG_CHARS = 4000


class DidNotStart(Exception):
    """`dejavu serve` ended or stayed silent; the message holds the end of its log."""


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM, too, leaves the block by an exception, as Ctrl-C does: what was started in it is stopped."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.asynccontextmanager
async def running_system(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, *, shows_log: bool = False
) -> AsyncIterator[str]:
    """Runs `dejavu serve --port 0 ARGUMENTS`, with additions to its environment; yields the clients' endpoint. Its log
    is kept, or goes to our stderr. Raises `DidNotStart`."""
    with ended_in_order(), tempfile.TemporaryDirectory(prefix="dejavu-running-") as folder:
        log = Path(folder, "serve.log")
        with log.open("wb") as kept:  # noqa: ASYNC230 - nothing else goes on here
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dejavu", "serve", "--port", "0", "--state-dir", folder, *arguments,
                stdout=asyncio.subprocess.PIPE,
                stderr=None if shows_log else kept,
                env=os.environ | (environment or {}),
            )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_LIMIT_S):
                line = (await process.stdout.readline()).decode()
            if not line.startswith("ready "):
                raise DidNotStart(_end_of(log))
            yield line.split()[1].split(",")[0]
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-MAX_LOG_CHARS:]
