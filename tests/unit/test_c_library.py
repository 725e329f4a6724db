"""Libraries in C: where they are built, and what of a build stays."""

from __future__ import annotations

import os
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
