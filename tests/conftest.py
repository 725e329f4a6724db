"""How many seeds the simulations run (`--seeds`): few with every change, thousands with `make simulate`. One that fails
names the command that runs it again. And what tests are to see of the world around them: its signals, and the one
warning that is no error."""

from __future__ import annotations

import signal
from collections.abc import Generator

import pytest


def _seeds(text: str) -> range:
    """Of "N" or "A:B"."""
    first, colon, end = text.partition(":")
    return range(int(first), int(end)) if colon else range(int(first))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seeds",
        type=_seeds,
        metavar="N|A:B",
        help="the first N seeds of every simulation, or those from A to B - 1, instead of each one's own few",
    )
    parser.addoption("--seed", type=int, metavar="S", help="this seed alone")


def pytest_configure(config: pytest.Config) -> None:
    # torch imports it where it is installed, as on many machines with a GPU
    config.addinivalue_line("filterwarnings", "ignore:The pynvml package is deprecated:FutureWarning")
    # who is run in the background, or by nohup, ignores these, and so would what tests start and interrupt
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("seeds")
    if marker is not None:
        alone = metafunc.config.getoption("--seed")
        several = metafunc.config.getoption("--seeds") or range(marker.args[0])
        seeds = several if alone is None else [alone]
        metafunc.parametrize("seed", seeds)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and "seed" in getattr(item, "fixturenames", ()):
        seed = item.callspec.params["seed"]  # type: ignore[attr-defined]
        command = f".venv/bin/python -m pytest '{item.nodeid}' --seed {seed}"
        report.sections.append(("to run this seed again", command))
    return report
