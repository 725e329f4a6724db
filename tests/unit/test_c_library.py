"""Libraries in C: where they are built, and what of a build stays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.c_library import build_library

COMPILER = """#!/bin/sh
echo "$TMPDIR" >> "{log}"
for argument; do
    if [ "$before" = -o ]; then : > "$argument"; fi
    before=$argument
done
"""

SLOW_COMPILER = """#!/bin/sh
echo "$$" >> "{log}"
until [ -e "{gate}" ]; do /bin/sleep 0.02; done
for argument; do
    if [ "$before" = -o ]; then : > "$argument"; fi
    before=$argument
done
"""

BUILDER = """
import logging, sys
from pathlib import Path
from common.c_library import build_library
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
print(build_library(Path(sys.argv[1]), [], []), flush=True)
"""
START_LIMIT_S = 30
ROOT = Path(__file__).resolve().parents[2]
Builder = subprocess.Popen[str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of a user whose compiler writes down where it may keep its own files."""
    compiler = tmp_path / "cc"
    compiler.write_text(COMPILER.format(log=tmp_path / "log"))
    compiler.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".cache" / "dejavu"
    folder.mkdir(mode=0o700, parents=True)
    return folder


def build(tmp_path: Path) -> Path:
    source = tmp_path / "pieces.c"
    source.touch()
    return build_library(source, [], [])


def test_what_the_compiler_leaves_lies_in_the_folder_of_the_build(cache: Path, tmp_path: Path) -> None:
    library = build(tmp_path)
    assert list(cache.iterdir()) == [library]
    folders = (tmp_path / "log").read_text().split()
    assert len(folders) == 2
    assert {Path(folder).parent for folder in folders} == {cache}


def test_a_build_that_was_killed_is_cleared_away_by_a_later_one_and_no_other(cache: Path, tmp_path: Path) -> None:
    under_way, left, older_library = cache / "under-way", cache / "left", cache / "kernels-0.so"
    for folder in (under_way, left):
        folder.mkdir()
        (folder / "compiled.o").touch()
    older_library.touch()
    for path in (left, older_library):
        os.utime(path, (0, 0))
    library = build(tmp_path)
    assert set(cache.iterdir()) == {library, under_way, older_library}
    assert (under_way / "compiled.o").exists()


def test_where_the_cache_cannot_be_written_all_processes_use_one_other_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.rmdir()
    cache.write_text("no folder")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    library = build(tmp_path)
    assert build(tmp_path) == library
    assert library.parent.parent == temporary and len(list(temporary.iterdir())) == 1
    assert len((tmp_path / "log").read_text().split()) == 2
    # others can write there: what lies there may be theirs
    library.parent.chmod(0o777)
    assert build(tmp_path).parent not in (library.parent, cache)


def test_what_lies_in_a_cache_that_cannot_be_written_is_used(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = build(tmp_path)
    # what root may not do can only be said, not had
    monkeypatch.setattr(os, "access", lambda path, mode, access=os.access: mode != os.W_OK and access(path, mode))
    (tmp_path / "log").unlink()
    assert build(tmp_path) == library
    assert not (tmp_path / "log").exists()


@pytest.fixture
def start(cache: Path, tmp_path: Path) -> Iterator[Callable[[], Builder]]:
    """Starts processes that want the same library; the compiler takes until there is a file `gate`."""
    (tmp_path / "cc").write_text(SLOW_COMPILER.format(log=tmp_path / "log", gate=tmp_path / "gate"))
    (tmp_path / "pieces.c").touch()
    started: list[Builder] = []
    watchdogs: list[threading.Timer] = []

    def start_one() -> Builder:
        command = [sys.executable, "-c", BUILDER, str(tmp_path / "pieces.c")]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        watchdogs.append(threading.Timer(START_LIMIT_S, started[-1].kill))
        watchdogs[-1].start()
        return started[-1]

    yield start_one
    (tmp_path / "gate").touch()  # for the compilers of those who were killed
    for process, watchdog in zip(started, watchdogs, strict=True):
        watchdog.cancel()
        process.kill()
        process.communicate()


def next_line(process: Builder) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_processes_that_want_the_same_build_it_once(start: Callable[[], Builder], cache: Path, tmp_path: Path) -> None:
    first = start()
    assert next_line(first).startswith("compiling pieces.c")
    others = [start(), start()]
    assert {next_line(other) for other in others} == {"waiting for another process that compiles pieces.c"}
    (tmp_path / "gate").touch()
    (library,) = {next_line(process) for process in (first, *others)}
    assert list(cache.iterdir()) == [Path(library)]
    assert len((tmp_path / "log").read_text().split()) == 2


def test_another_goes_on_where_the_one_that_builds_is_killed(start: Callable[[], Builder], tmp_path: Path) -> None:
    first = start()
    assert next_line(first).startswith("compiling")
    second = start()
    assert next_line(second).startswith("waiting")
    first.kill()
    assert next_line(second).startswith("compiling")
    (tmp_path / "gate").touch()
    assert Path(next_line(second)).exists()
