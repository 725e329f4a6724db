"""Simulations by many seeds: each runs once, and which has failed can be run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.simulate import cut, seed_range, simulations

FAILS_AT_5 = """
import pytest

@pytest.mark.seeds(1)
def test_it(seed):
    assert seed != 5
"""


@pytest.mark.parametrize(("first", "end", "num_jobs"), [(0, 2000, 2), (500, 1000, 3), (0, 3, 8), (7, 8, 1)])
def test_every_seed_is_in_one_piece(first: int, end: int, num_jobs: int) -> None:
    pieces = [range(*seed_range(piece)) for piece in cut(first, end, num_jobs)]
    assert [seed for piece in pieces for seed in piece] == list(range(first, end))
    assert len(pieces) >= min(num_jobs, end - first)


def test_a_number_is_so_many_seeds() -> None:
    assert seed_range("20") == (0, 20)
    with pytest.raises(ValueError):
        seed_range("a:b")


def test_every_simulation_is_run() -> None:
    assert "tests/unit/test_fleet.py" in simulations()


def test_what_fails_is_told_with_the_command_that_runs_it_again(tmp_path: Path) -> None:
    test = tmp_path / "test_five.py"
    test.write_text(FAILS_AT_5)
    run = f"run_all(['2:4', '4:6', '6:8'], 2, ['-p', 'tests.conftest', {str(test)!r}])"
    told = f"from loadtest.simulate import run_all; print([(each.seeds, each.replays) for each in {run}])"
    said = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=60).stdout
    [last] = [line for line in said.splitlines() if line.startswith("[(")]
    found = dict(eval(last))
    assert found.keys() == {"2:4", "4:6", "6:8"}
    assert found["2:4"] == found["6:8"] == []
    [command] = found["4:6"]
    assert command.startswith(".venv/bin/python -m pytest '") and command.endswith("test_five.py::test_it[5]' --seed 5")
