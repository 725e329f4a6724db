"""What can be done to a running system. A strike finds its victims by `status`, as anybody could."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dejavu import AsyncClient
from loadtest.history import ETCD

Status = Mapping[str, Any]
Service = Mapping[str, Any]

STOPPED_S = 10.0
STORM_S = 10.0
STORM_KILLS = 5
SIGHTING_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Scene:
    """A system under load just before the strike; `status` is from before the load."""

    client: AsyncClient
    status: Status
    draws: random.Random
    struck_at_s: dict[str, float] = field(default_factory=dict)
    """when (monotonic) each victim was sent its signal; a strike may take a while before"""

    def signal(self, victim: Service, number: signal.Signals) -> str:
        """Sends it; returns the victim's name."""
        self.struck_at_s[str(victim["name"])] = time.monotonic()  # before: it may be noticed within the call
        os.kill(victim["pid"], number)
        return str(victim["name"])


Strike = Callable[[Scene], Awaitable[list[str]]]
"""Does it; returns the names of the services that were struck."""


def kill(role: str, state: str = "active") -> Strike:
    """kill -9 of one of them."""
    return _signal(role, state, signal.SIGKILL)


def poke(role: str, number: signal.Signals) -> Strike:
    """A signal for which the service has a fault hook."""
    return _signal(role, "active", number)


def stop(role: str, state: str = "active") -> Strike:
    """SIGSTOP; SIGCONT after ten seconds."""

    async def strike(scene: Scene) -> list[str]:
        victim = _pick(scene, role, state)
        asyncio.get_running_loop().call_later(STOPPED_S, _continue, victim["pid"])
        return [scene.signal(victim, signal.SIGSTOP)]

    return strike


def both(first: Strike, second: Strike, pause_s: float = 0.0) -> Strike:
    """One, and the other up to `pause_s` later."""

    async def strike(scene: Scene) -> list[str]:
        struck = await first(scene)
        await asyncio.sleep(pause_s * scene.draws.random())
        return struck + await second(scene)

    return strike


async def kill_token_stages(scene: Scene) -> list[str]:
    """All stages of all token pipelines at once."""
    victims = _find(scene.status, "token_stage", "active")
    return [scene.signal(victim, signal.SIGKILL) for victim in victims]


async def kill_twice(scene: Scene) -> list[str]:
    """A token stage, and what takes its place as soon as the death has been noticed."""
    first = _pick(scene, "token_stage", "active")
    at_s = time.monotonic()
    scene.signal(first, signal.SIGKILL)
    place = (first["pipeline"], first["stage_index"])
    async with asyncio.timeout(SIGHTING_LIMIT_S):
        while not _is_noticed(status := await scene.client.status(), first["name"], at_s):
            pass
    heir = next(
        service
        for service in status["services"]
        if (service["pipeline"], service["stage_index"]) == place and service["incarnation"] != first["incarnation"]
    )
    return [str(first["name"]), scene.signal(heir, signal.SIGKILL)]


async def storm(scene: Scene) -> list[str]:
    """Five services die, one after the other; whatever stands in for one may be next."""
    struck = []
    for _ in range(STORM_KILLS):
        services = (await scene.client.status())["services"]
        victim = scene.draws.choice(services)
        struck.append(scene.signal(victim, signal.SIGKILL))
        await asyncio.sleep(STORM_S / STORM_KILLS * scene.draws.uniform(0.5, 1.0))
    return struck


async def kill_etcd(scene: Scene) -> list[str]:
    """The one that belongs to the same `serve` as the services."""
    os.kill(_etcd_pid(scene.status), signal.SIGKILL)
    return [ETCD]


def stop_etcd(outage_s: float) -> Strike:
    """SIGSTOP of etcd, so that it answers nobody; SIGCONT after the outage."""

    async def strike(scene: Scene) -> list[str]:
        pid = _etcd_pid(scene.status)
        os.kill(pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(outage_s, _continue, pid)
        return [ETCD]

    return strike


async def damage_stores(scene: Scene) -> list[str]:
    """Flips the bits of a byte in every page that the stores have written to."""
    for store in _find(scene.status, "cache_store", "active"):
        with _pool_memory(store) as memory:
            pages = np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE]
            pages[pages != 0] ^= 0xFF
            del pages
    return []


async def shuffle_stores(scene: Scene) -> list[str]:
    """Every page that the stores have written to gets what another one holds: good KV, of other tokens."""
    for store in _find(scene.status, "cache_store", "active"):
        with _pool_memory(store) as memory:
            pages = np.frombuffer(memory, dtype=np.uint8).reshape(-1, mmap.PAGESIZE)
            written = np.flatnonzero(pages.any(axis=1))
            pages[written] = pages[np.roll(written, 1)]
            del pages
    return []


def limit_files(seconds: float) -> Strike:
    """The stores' files cannot grow any more (RLIMIT_FSIZE), as on a full disk; they can again after so long."""

    async def strike(scene: Scene) -> list[str]:
        for store in _find(scene.status, "cache_store", "active"):
            before = resource.prlimit(store["pid"], resource.RLIMIT_FSIZE)
            resource.prlimit(store["pid"], resource.RLIMIT_FSIZE, (0, before[1]))
            asyncio.get_running_loop().call_later(seconds, _lift_limit, store["pid"], before)
        return []

    return strike


def _signal(role: str, state: str, number: signal.Signals) -> Strike:
    async def strike(scene: Scene) -> list[str]:
        return [scene.signal(_pick(scene, role, state), number)]

    return strike


def _find(status: Status, role: str, state: str) -> list[Service]:
    found = [s for s in status["services"] if s["role"] == role and s["state"] == state]
    if not found:
        raise LookupError(f"no {role} is {state}")
    return found


def _pick(scene: Scene, role: str, state: str) -> Service:
    return scene.draws.choice(_find(scene.status, role, state))


def _is_noticed(status: Status, name: str, since_s: float) -> bool:
    return any(
        event["kind"] == "detected" and event["service"] == name and event["at_monotonic_s"] >= since_s
        for event in status["events"]
    )


def _continue(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
        os.kill(pid, signal.SIGCONT)


def _lift_limit(pid: int, limits: tuple[int, int]) -> None:
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def _pool_memory(store: Service) -> Iterator[mmap.mmap]:
    """The memory of a store's pool, found as a debugger would. Raises `LookupError`."""
    for entry in Path(f"/proc/{store['pid']}/fd").iterdir():
        if _target(entry).startswith(f"/memfd:{store['name']} "):
            with entry.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                yield memory
            return
    raise LookupError(f"{store['name']} has no memory of this name")


def _target(link: Path) -> str:
    """Empty where it has been closed meanwhile."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def _etcd_pid(status: Status) -> int:
    parent = parent_of(status["services"][0]["pid"])
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or parent_of(int(entry.name)) != parent:
            continue
        if b"--listen-client-urls" in (entry / "cmdline").read_bytes():
            return int(entry.name)
    raise LookupError("this system's etcd is not a process of its own here")


def parent_of(pid: int) -> int:
    """0 where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0
