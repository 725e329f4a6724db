"""The `dejavu` command: it imports what it needs once it can be interrupted quietly."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_serve = arguments[:1] == ["serve"]
    try:
        if is_serve:
            # not through argparse: `serve` has its own options and its own --help
            from dejavu.cli_serve import serve

            return serve(arguments[1:])
        from dejavu.cli_commands import run

        return run(arguments)
    except KeyboardInterrupt:
        # a `serve` that is interrupted before it can handle that has nothing to stop yet
        return 0 if is_serve else EXIT_INTERRUPTED
