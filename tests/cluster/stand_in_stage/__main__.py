"""A process for tests of what starts processes: says who it is, then does what it is told."""

from __future__ import annotations

import os
import signal
import sys

from common.process import INCARNATION_VARIABLE, die_with_parent


def main(argv: list[str]) -> int:
    """`wait`, `raise`, or an exit code."""
    die_with_parent()
    sys.stdout.write(f"{os.getpid()} {os.getppid()} {os.getsid(0)} {os.environ.get(INCARNATION_VARIABLE)}\n")
    sys.stdout.flush()
    if argv[0] == "wait":
        signal.pause()
    if argv[0] == "raise":
        raise RuntimeError("as told")
    return int(argv[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
