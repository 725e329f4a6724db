"""A process that has imported what stages need and forks them: a stage is there in milliseconds instead of seconds.

`python -m deploy.nursery FD MODULES PADDING` imports the comma-separated MODULES, then answers every `Birth` that
comes with a descriptor for its output over the socket FD with the pid of a new process that runs it. Forked twice, the
new process belongs to the one that asked (a child subreaper), not to the nursery: it is waited for, and dies with its
parent, as if it had been started there, and the end of the nursery harms nobody.

Nothing here may start a thread or touch CUDA before a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from common.process import die_with_parent

MAX_MESSAGE_BYTES = 64 << 10
PADDING = "." * 2048
"""Room for the command lines of children, which `ps` finds where the nursery's own was."""


class Birth(msgspec.Struct, frozen=True):
    """Run `main(arguments)` of `module`.__main__ with these additions to the environment."""

    module: str
    arguments: list[str]
    environment: dict[str, str]


def main(argv: list[str]) -> int:
    """Forks until the other side closes the socket; in a forked process, returns its exit code."""
    control = socket.socket(fileno=int(argv[0]))
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _show_command_line([sys.executable, "-m", "deploy.nursery"])
    for module in argv[1].split(","):
        with contextlib.suppress(ImportError):  # the stage that needs it says so
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
        if not data:
            return 0
        born = msgspec.json.decode(data, type=Birth)
        pid = _fork_orphan()
        if pid == 0:
            control.close()
            return _live(born, descriptors[0])
        os.close(descriptors[0])
        control.send(str(pid).encode())


def _fork_orphan() -> int:
    """Like fork, but the new process's parent is the nearest subreaper above. It begins once that is so."""
    pid_read, pid_write = os.pipe()
    go_read, go_write = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.close(go_write)
        pid = os.fork()
        if pid:
            os.write(pid_write, str(pid).encode())
            os._exit(0)
        os.read(go_read, 1)  # ends when the nursery closes the other end
        for descriptor in (pid_read, pid_write, go_read):
            os.close(descriptor)
        return 0
    for descriptor in (pid_write, go_read):
        os.close(descriptor)
    pid = int(os.read(pid_read, 32))
    os.close(pid_read)
    os.waitpid(middle, 0)  # after this the system has given its child a new parent
    os.close(go_write)
    return pid


def _live(born: Birth, output: int) -> int:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)
    os.environ.update(born.environment)
    sys.argv = [born.module, *born.arguments]
    _show_command_line([sys.executable, "-m", born.module, *born.arguments])
    code: int = importlib.import_module(f"{born.module}.__main__").main(born.arguments)
    return code


def _show_command_line(argv: list[str]) -> None:
    """Writes what `ps` shows over the arguments that this process was started with (see PADDING)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    room = end - start
    text = b"\0".join(os.fsencode(argument) for argument in argv)[: room - 1]
    ctypes.memmove(start, text.ljust(room, b"\0"), room)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
