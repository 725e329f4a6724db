"""Keeps a system's processes alive: starts them, passes on their logs, respawns what dies, stops all of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from common.process import INCARNATION_VARIABLE, PARENT_VARIABLE, is_stopped, new_incarnation
from common.service import FATAL_EXIT, TRY_AGAIN_EXIT
from deploy.children import Child, Spawner
from deploy.layout import ServiceCommand

logger = logging.getLogger(__name__)

MAX_SHORT_LIVES = 3
SHORT_LIFE_S = 30.0
STOP_LIMIT_S = 10.0
LOOK_S = 1.0
"""Between two looks for processes that are stopped. Who is so in two of them is killed."""


class ServiceGaveUp(Exception):
    """A service cannot be kept alive; the message names it."""


@dataclass(frozen=True, slots=True)
class ServiceExit:
    """The end of a service's process; `exit_code` is minus the signal's number where one ended it."""

    name: str
    role: str
    pid: int
    incarnation: str
    exit_code: int
    at_monotonic_s: float


class Supervisor:
    """Runs service commands, each under the respawning eye of one task. `on_exit` is told of every end the moment the
    system reports it, before anything else is done about it. Processes of `roles_to_unblock` that are stopped (SIGSTOP)
    are killed, and so replaced: for those whom nobody else watches."""

    def __init__(
        self,
        commands: Sequence[ServiceCommand],
        spawner: Spawner,
        on_exit: Callable[[ServiceExit], None] = lambda ended: None,
        roles_to_unblock: Collection[str] = (),
    ) -> None:
        self._commands = commands
        self._spawner = spawner
        self._on_exit = on_exit
        self._unblocked = [command for command in commands if command.role in roles_to_unblock]
        self._children: dict[str, Child] = {}
        self._last_words: dict[str, str] = {}
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Runs until `stop()` was called and every process has ended. Raises `ServiceGaveUp`."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for command in self._commands:
                    tasks.create_task(self._keep(command))
                if self._unblocked:
                    tasks.create_task(self._unblock())
        except* ServiceGaveUp as group:
            raise group.exceptions[0] from None

    def pid_of(self, name: str) -> int | None:
        """The latest process of a service, None before its first."""
        child = self._children.get(name)
        return None if child is None else child.pid

    async def is_stopping_within(self, limit_s: float) -> bool:
        """Waits so long at most for `stop()` or `kill()`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), limit_s)
        return self._stopping.is_set()

    def signal_role(self, role: str, number: int) -> None:
        """To all services of a role that live now."""
        for command in self._commands:
            child = self._children.get(command.name)
            if command.role == role and child is not None:
                child.send_signal(number)

    async def stop(self, limit_s: float = STOP_LIMIT_S) -> None:
        """SIGTERM to all, SIGKILL to what is left after `limit_s`."""
        self._stopping.set()
        self._end(signal.SIGTERM)
        exits = [child.exited for child in self._children.values()]
        if exits:
            await asyncio.wait(exits, timeout=limit_s)
        self.kill()

    def kill(self) -> None:
        """SIGKILL to all, at once."""
        self._stopping.set()
        self._end(signal.SIGKILL)

    def _end(self, number: int) -> None:
        for child in self._children.values():
            child.end(number)

    async def _unblock(self) -> None:
        suspects: set[int] = set()
        while not await self.is_stopping_within(LOOK_S):
            stopped: set[int] = set()
            for command in self._unblocked:
                child = self._children.get(command.name)
                if child is None or child.exited.done() or not is_stopped(child.pid):
                    continue
                stopped.add(child.pid)
                if child.pid in suspects:
                    logger.warning("%s is stopped: killing it", command.name)
                    child.end(signal.SIGKILL)
            suspects = stopped

    async def _keep(self, command: ServiceCommand) -> None:
        num_short_lives = 0
        try:
            while not self._stopping.is_set():
                started_s = time.monotonic()
                code = await self._run_once(command)
                if self._stopping.is_set():
                    return
                lived_s = time.monotonic() - started_s
                logger.warning("%s ended with %s after %.1f s", command.name, code, lived_s)
                # who is killed from outside, was told to end in order, or waits for etcd is not to blame
                is_short = lived_s < SHORT_LIFE_S and code not in (0, -signal.SIGKILL, TRY_AGAIN_EXIT)
                num_short_lives = num_short_lives + 1 if is_short else 0
                if code == FATAL_EXIT or num_short_lives == MAX_SHORT_LIVES:
                    raise ServiceGaveUp(
                        f"{command.name} cannot be kept alive (exit {code}): {self._last_words.get(command.name, '')}"
                    )
        finally:
            child = self._children.get(command.name)
            if child is not None:
                child.end(signal.SIGKILL)
                await asyncio.wait([child.exited])

    async def _run_once(self, command: ServiceCommand) -> int:
        incarnation = new_incarnation()
        environment = {
            "OMP_NUM_THREADS": _threads(command),
            "PYTHONUNBUFFERED": "1",
            INCARNATION_VARIABLE: incarnation,
            PARENT_VARIABLE: str(os.getpid()),
        }
        child = await self._spawn(command, environment)
        if child is None:
            return 0
        child.exited.add_done_callback(
            lambda exited: self._on_exit(
                ServiceExit(command.name, command.role, child.pid, incarnation, exited.result(), time.monotonic())
            )
        )
        while line := await _next_line(child.output):
            sys.stderr.write(f"{command.name:>16} | {line}\n")
            self._last_words[command.name] = line.strip()
        sys.stderr.flush()
        return await asyncio.shield(child.exited)

    async def _spawn(self, command: ServiceCommand, environment: Mapping[str, str]) -> Child | None:
        """None where all is to stop: what is not there yet is not waited for."""
        spawning = asyncio.ensure_future(self._bear(command, environment))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait([spawning, stopping], return_when=asyncio.FIRST_COMPLETED)
            return spawning.result() if spawning.done() else None
        finally:
            spawning.cancel()
            stopping.cancel()

    async def _bear(self, command: ServiceCommand, environment: Mapping[str, str]) -> Child:
        # known the moment it is there: nobody may wait for it any more
        child = self._children[command.name] = await self._spawner.spawn(command, environment)
        return child


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
