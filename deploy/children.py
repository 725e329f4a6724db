"""Child processes on an event loop: started directly or forked by the nursery, their end known at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from common.process import become_subreaper
from deploy.layout import ServiceCommand
from deploy.nursery import MAX_MESSAGE_BYTES, PADDING, Birth

logger = logging.getLogger(__name__)


ANSWER_LIMIT_S = 20.0
"""For a nursery that has answered before: beyond that it stands still. Its first answer may take it long to import."""


@dataclass(frozen=True, slots=True)
class Child:
    """A running process; `output` is its stdout and stderr, `exited` its exit code (minus the signal's number)."""

    pid: int
    output: asyncio.StreamReader
    exited: asyncio.Future[int]

    def send_signal(self, number: int) -> None:
        # until `exited` is done the process is not waited for, so the pid is its own
        if not self.exited.done():
            os.kill(self.pid, number)

    def end(self, number: int) -> None:
        """SIGTERM or SIGKILL to it and to what it has started, as a compiler, which would outlive it."""
        if not self.exited.done():
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # it has just been forked and is not in a group of its own yet
                os.kill(self.pid, number)


class Spawner(Protocol):
    """How a service's process comes to be."""

    async def spawn(self, command: ServiceCommand, environment: Mapping[str, str]) -> Child:
        """Raises `OSError`."""


class DirectSpawner:
    """Starts every process afresh, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def spawn(self, command: ServiceCommand, environment: Mapping[str, str]) -> Child:
        """Starts a process in a session of its own. Raises `OSError`."""
        with _output_pipe() as (read_end, write_end):
            process = subprocess.Popen(  # noqa: ASYNC220 - takes milliseconds
                command.argv,
                cwd=self._folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
            )
        return await _child(process.pid, read_end, process.wait)


class Nursery:
    """Forks stages from a process that has imported `modules`; everything else, and what the nursery cannot do, is
    started directly."""

    def __init__(self, folder: Path, modules: Sequence[str]) -> None:
        become_subreaper()
        self._folder = folder
        self._modules = modules
        self._direct = DirectSpawner(folder)
        self._asking = asyncio.Lock()
        self._start()

    def _start(self) -> None:
        self._has_answered = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.nursery", str(theirs.fileno()), ",".join(self._modules), PADDING],
                cwd=self._folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        """Ends the nursery, not its children."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    async def spawn(self, command: ServiceCommand, environment: Mapping[str, str]) -> Child:
        """Forks a stage, starts anything else. Raises `OSError`."""
        if not _module(command).endswith("_stage"):
            return await self._direct.spawn(command, environment)
        async with self._asking:
            try:
                return await self._ask(command, environment)
            except (OSError, ValueError) as error:
                logger.warning("the nursery is gone (%r): %s is started directly", error, command.name)
                self.close()
                self._start()
        return await self._direct.spawn(command, environment)

    async def _ask(self, command: ServiceCommand, environment: Mapping[str, str]) -> Child:
        arguments = list(command.argv[command.argv.index("-m") + 2 :])
        birth = msgspec.json.encode(Birth(_module(command), arguments, dict(environment)))
        with _output_pipe() as (read_end, write_end):
            socket.send_fds(self._control, [birth], [write_end])
            async with asyncio.timeout(ANSWER_LIMIT_S if self._has_answered else None):
                pid = int(await asyncio.get_running_loop().sock_recv(self._control, MAX_MESSAGE_BYTES))
            self._has_answered = True
        return await _child(pid, read_end, lambda: _reap(pid))


def _module(command: ServiceCommand) -> str:
    """Services that run layers are the modules that end in `_stage`, whatever their role."""
    return command.argv[command.argv.index("-m") + 1]


def watch_exit(pid: int, reap: Callable[[], int]) -> asyncio.Future[int]:
    """A future that gets the child's exit code from `reap`, which may block until the child has ended."""
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[int] = loop.create_future()

    def on_exit() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        _set(exited, reap())

    def wait() -> None:
        code = reap()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(_set, exited, code)

    try:
        descriptor = os.pidfd_open(pid)
    except (AttributeError, OSError):  # older systems, and sandboxes in front of the kernel, lack it
        threading.Thread(target=wait, name=f"wait-{pid}", daemon=True).start()
    else:
        loop.add_reader(descriptor, on_exit)
    return exited


def _set(exited: asyncio.Future[int], code: int) -> None:
    if not exited.done():
        exited.set_result(code)


def _reap(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextlib.contextmanager
def _output_pipe() -> Iterator[tuple[int, int]]:
    """(read end, write end); the write end is only open inside, the read end stays open if all went well."""
    read_end, write_end = os.pipe()
    try:
        yield read_end, write_end
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)


async def _child(pid: int, read_end: int, reap: Callable[[], int]) -> Child:
    """Ends the process where it is given up before anybody knows it."""
    try:
        output = await _reader(read_end)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        reap()
        raise
    return Child(pid, output, watch_exit(pid, reap))


async def _reader(descriptor: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader
