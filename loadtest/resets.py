"""Connections between two living services, broken at once: both ends are told, and whatever was on its way is lost.

`ss --kill` does it, for whoever may administer the network: in a network namespace of its own (`loadtest.partition`)
anybody may, where the kernel lets users have one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from deploy.running import running_system
from loadtest.partition import NoNamespaces
from loadtest.strikes import Scene, Strike

RESETS_S = 2.0
NUM_RESETS = 10
_PROCESS = re.compile(r"pid=(\d+)")

Place = tuple[str, int | None]
"""The role of a service, and of which stage."""


@contextlib.asynccontextmanager
async def alone(arguments: Sequence[str], environment: Mapping[str, str]) -> AsyncIterator[str]:
    """`running_system` in a network that has nothing but itself. Call it inside."""
    _said("ip", "link", "set", "lo", "up")
    async with running_system(arguments, environment) as endpoint:
        yield endpoint


def reset(first: Place, second: Place, *, is_missed: bool = False) -> Strike:
    """Every connection between the two, again and again for two seconds. `is_missed`: the first may be taken for dead.
    Raises `NoNamespaces` where none can be broken."""

    async def strike(scene: Scene) -> list[str]:
        one, other = _at_work(scene.status, first), _at_work(scene.status, second)
        num_broken = 0
        for _ in range(NUM_RESETS):
            num_broken += _break(one["pid"], other["pid"])
            await asyncio.sleep(2 * RESETS_S / NUM_RESETS * scene.draws.random())
        if not num_broken:
            raise NoNamespaces(f"ss --kill must break the connections between {one['name']} and {other['name']}")
        return [str(one["name"])] if is_missed else []

    return strike


def _break(first: int, second: int) -> int:
    """How many connections of these processes were broken: there may be none, or one may just have ended."""
    known = between(first, second, _said("ss", "-Htnp", "state", "established"))
    return sum(bool(_said("ss", "-HKtn", "src", ours, "dst", theirs)) for ours, theirs in known)


def between(first: int, second: int, said: str) -> list[tuple[str, str]]:
    """The connections of two processes in what `ss -Htnp` says: address and port of the first one's end, and of the
    other's."""
    ends = []
    for line in said.splitlines():
        _, _, ours, theirs, *users = line.split()
        ends += [(ours, theirs, int(pid)) for pid in _PROCESS.findall(" ".join(users))]
    of_second = {(ours, theirs) for ours, theirs, pid in ends if pid == second}
    return [(ours, theirs) for ours, theirs, pid in ends if pid == first and (theirs, ours) in of_second]


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _at_work(status: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
    return next(
        service
        for service in status["services"]
        if (service["role"], service["stage_index"]) == place and service["state"] in ("active", "leader")
    )
