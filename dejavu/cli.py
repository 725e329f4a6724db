"""The `dejavu` command: it imports what it needs once it can be interrupted quietly."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_serve = arguments[:1] == ["serve"]
    try:
        if is_serve:
            _end_as_by_ctrl_c()
            # not through argparse: `serve` has its own options and its own --help
            from dejavu.cli_serve import serve

            return serve(arguments[1:])
        from dejavu.cli_commands import run

        return run(arguments)
    except KeyboardInterrupt:
        # a `serve` that is interrupted before it handles signals itself has undone on its way here what it had begun
        return 0 if is_serve else EXIT_INTERRUPTED


def _end_as_by_ctrl_c() -> None:
    """SIGTERM and SIGHUP would end the process on the spot, and leave the files of an etcd that is being started. What
    is ignored stays so: nohup asks for that."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
