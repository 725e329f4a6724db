"""How many seeds the simulations run (`--seeds`): few with every change, thousands with `make simulate`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, metavar="N", help="seeds of every simulation, instead of each one's own few")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("seeds")
    if marker is not None:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--seeds") or marker.args[0]))
