"""Starts and stops the system under test: `dejavu serve` as a user would type it."""

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
async def running_system(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> AsyncIterator[str]:
    """Runs `dejavu serve --port 0 ARGUMENTS`, with additions to its environment; yields the clients' endpoint. Raises
    `DidNotStart`."""
    with ended_in_order(), tempfile.TemporaryDirectory(prefix="dejavu-load-") as folder:
        log = Path(folder, "serve.log")
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dejavu", "serve", "--port", "0", "--state-dir", folder, *arguments,
                stdout=asyncio.subprocess.PIPE, stderr=errors, env=os.environ | (environment or {}),
            )  # fmt: skip
        assert process.stdout is not None
        try:
            async with asyncio.timeout(START_LIMIT_S):
                line = (await process.stdout.readline()).decode()
            if not line.startswith("ready "):
                raise DidNotStart(log.read_text(errors="replace")[-4000:])
            yield line.split()[1].split(",")[0]
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await process.wait()
