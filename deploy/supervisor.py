"""Keeps a system's processes alive: starts them, passes on their logs, respawns what dies, stops all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.service import FATAL_EXIT
from deploy.layout import ServiceCommand

logger = logging.getLogger(__name__)

MAX_SHORT_LIVES = 3
SHORT_LIFE_S = 30.0
STOP_LIMIT_S = 10.0


class ServiceGaveUp(Exception):
    """A service cannot be kept alive; the message names it."""


class Supervisor:
    """Runs service commands in `folder`, each under the respawning eye of one task. `on_exit(name, pid)` hears of
    every process that ended without being asked to."""

    def __init__(self, commands: Sequence[ServiceCommand], folder: Path, on_exit: Callable[[str, int], None]) -> None:
        self._commands = commands
        self._folder = folder
        self._on_exit = on_exit
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._is_stopping = False

    async def run(self) -> None:
        """Runs until `stop()` was called and every process has ended. Raises `ServiceGaveUp`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for command in self._commands:
                    tasks.create_task(self._keep(command))
        except* ServiceGaveUp as group:
            raise group.exceptions[0] from None

    async def stop(self) -> None:
        """SIGTERM to all, SIGKILL to what is left after ten seconds."""
        self._is_stopping = True
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_LIMIT_S):
                await asyncio.gather(*(process.wait() for process in self._processes.values()))
                return
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all, at once."""
        self._is_stopping = True
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    async def _keep(self, command: ServiceCommand) -> None:
        num_short_lives = 0
        try:
            while not self._is_stopping:
                started_s = time.monotonic()
                code = await self._run_once(command)
                if self._is_stopping:
                    return
                self._on_exit(command.name, self._processes[command.name].pid)
                lived_s = time.monotonic() - started_s
                logger.warning("%s ended with %s after %.1f s", command.name, code, lived_s)
                # who is killed from outside is not to blame
                is_short = lived_s < SHORT_LIFE_S and code != -signal.SIGKILL
                num_short_lives = num_short_lives + 1 if is_short else 0
                if code == FATAL_EXIT or num_short_lives == MAX_SHORT_LIVES:
                    raise ServiceGaveUp(f"{command.name} cannot be kept alive (exit {code}); its log is above")
        finally:
            process = self._processes.get(command.name)
            if process is not None and process.returncode is None:
                process.kill()
                await process.wait()

    async def _run_once(self, command: ServiceCommand) -> int:
        process = await asyncio.create_subprocess_exec(
            *command.argv,
            cwd=self._folder,
            env=os.environ | {"OMP_NUM_THREADS": _threads(command), "PYTHONUNBUFFERED": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self._processes[command.name] = process
        assert process.stdout is not None
        while line := await _next_line(process.stdout):
            sys.stderr.write(f"{command.name:>16} | {line}\n")
        sys.stderr.flush()
        return await process.wait()


async def _next_line(stream: asyncio.StreamReader) -> str:
    """The next line that says something, '' at the end. A line without end is passed on in pieces."""
    while True:
        try:
            data = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            data = error.partial
            if not data:
                return ""
        except asyncio.LimitOverrunError as error:
            data = await stream.readexactly(error.consumed)
        text = data.decode(errors="replace").rstrip()
        if text:
            return text


def _threads(command: ServiceCommand) -> str:
    argv = command.argv
    return argv[argv.index("--threads") + 1] if "--threads" in argv else "1"
