"""Runs every simulation with many seeds, on all cores: `python -m loadtest.simulate --seeds N [--jobs J] [pytest ...]`.

A piece of some seeds is one run of pytest in a fork of this process, which has imported what takes long. What came of
it is told when it is over: where it has failed, what pytest said and the command that runs the seed again. What else is
given is for pytest: `-k fleet`, or a file of tests.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import pytest

from loadtest.figures import save
from loadtest.machine import describe_machine
from loadtest.options import add_json, new_parser

SEEDS_PER_PIECE = 25
FOR_PYTEST = ["-q", "-m", "seeds", "--tb=native", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
FOR_PYTEST += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
TAKES_LONG = ("services.prompt_stage.service", "services.token_stage.service", "services.router.service")
REPLAY = re.compile(r"^\S*python -m pytest .* --seed \d+$", re.MULTILINE)
"""As tests/conftest.py says it."""
SUMMARY = re.compile(r"\d+ (passed|failed|deselected|errors?)\b.* in [\d.]+s")


@dataclass
class Piece:
    """Seeds "A:B", from A to B - 1. `replays` are commands, one for each failure."""

    seeds: str
    started_s: float
    summary: str = ""
    duration_s: float = 0.0
    replays: list[str] = field(default_factory=list)


def cut(first: int, end: int, num_jobs: int) -> list[str]:
    """Ranges of seeds as `--seeds` takes them: every job has some, and none is so long that the others wait for it."""
    size = max(1, min(SEEDS_PER_PIECE, -(-(end - first) // num_jobs)))
    return [f"{start}:{min(start + size, end)}" for start in range(first, end, size)]


def simulations() -> list[str]:
    """The files with tests that run by seeds: nothing else has to be imported."""
    return sorted(str(path) for path in Path("tests").rglob("test_*.py") if "mark.seeds" in path.read_text())


def start(seeds: str, for_pytest: list[str], said: IO[bytes]) -> int:
    """Returns the process id of the piece, which says everything in `said`."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 3
    try:
        for fd in (1, 2):
            os.dup2(said.fileno(), fd)
        status = int(pytest.main([*FOR_PYTEST, "--seeds", seeds, *for_pytest]))
    except BaseException:  # noqa: BLE001 - it must not go on as its parent
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def end(piece: Piece, status: int, said: IO[bytes]) -> None:
    """Tells what came of it where that is not just success."""
    said.seek(0)
    output = said.read().decode(errors="replace")
    said.close()
    lines = output.strip().splitlines() or ["no output"]
    # what is collected at its end may say something after pytest
    piece.summary = next(filter(SUMMARY.search, reversed(lines)), lines[-1]).strip("= ")
    piece.duration_s = round(time.monotonic() - piece.started_s, 1)
    piece.replays = REPLAY.findall(output)
    if status != 0:
        print(output)
        if not piece.replays:  # it did not get as far as that
            piece.replays = [f".venv/bin/python -m pytest -m seeds --seeds {piece.seeds}"]


def run_all(ranges: Iterable[str], num_jobs: int, for_pytest: list[str]) -> list[Piece]:
    """Tells of each as it ends."""
    waiting, started_s = deque(ranges), time.monotonic()
    num_pieces = len(waiting)
    running: dict[int, tuple[Piece, IO[bytes]]] = {}
    over: list[Piece] = []
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                output = tempfile.TemporaryFile()  # noqa: SIM115
                begun = Piece(waiting.popleft(), time.monotonic())
                running[start(begun.seeds, for_pytest, output)] = (begun, output)
            pid, status = os.wait()
            piece, said = running.pop(pid)
            end(piece, status, said)
            over.append(piece)
            left_s = (time.monotonic() - started_s) / len(over) * (num_pieces - len(over))
            progress = f"{len(over)} of {num_pieces}, about {left_s / 60:.0f} min left"
            print(f"seeds {piece.seeds}: {piece.summary} ({progress})", flush=True)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
    return over


def seed_range(text: str) -> tuple[int, int]:
    """Of "N" (the first N) or "A:B" (from A to B - 1). Raises `ValueError`."""
    first, colon, end = text.partition(":")
    return (int(first), int(end)) if colon else (0, int(first))


def main() -> int:
    parser = new_parser("simulate", __doc__)
    parser.add_argument("--seeds", type=seed_range, default="2000", metavar="N|A:B", help="the first N, or A to B - 1")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, metavar="J", help="processes; by default one a core")
    add_json(parser, required=False)
    options, for_pytest = parser.parse_known_args()
    first, end = options.seeds
    if not any(Path(argument.partition("::")[0]).exists() for argument in for_pytest):
        for_pytest += simulations()
    for module in TAKES_LONG:
        importlib.import_module(module)
    started_s = time.monotonic()
    over = run_all(cut(first, end, options.jobs), options.jobs, for_pytest)
    duration_s = time.monotonic() - started_s
    failed = [command for piece in over for command in piece.replays]
    if options.json is not None:
        figures = {"machine": describe_machine(), "jobs": options.jobs, "duration_s": round(duration_s)}
        save(options.json, {**figures, "pieces": [asdict(piece) for piece in over]})
    print(f"seeds {first} to {end - 1}: {len(failed)} failures, {duration_s / 60:.1f} min", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
