"""The faults that `loadtest.chaos` knows: how the system is started for them, and what is done to whom."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Status = Mapping[str, Any]
Strike = Callable[[Status, random.Random], Awaitable[list[str]]]
"""Does it; returns the names of the services that were struck."""

STOPPED_S = 10.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`max_recomputed_tokens` is per stream; None: no bound."""

    what: str
    strike: Strike
    arguments: tuple[str, ...] = ()
    max_recomputed_tokens: int | None = None


def _pick(status: Status, draws: random.Random, role: str, state: str) -> Mapping[str, Any]:
    found = [s for s in status["services"] if s["role"] == role and s["state"] == state]
    if not found:
        raise LookupError(f"no {role} is {state}")
    picked: Mapping[str, Any] = draws.choice(found)
    return picked


def _kill(role: str, state: str = "active") -> Strike:
    async def strike(status: Status, draws: random.Random) -> list[str]:
        victim = _pick(status, draws, role, state)
        os.kill(victim["pid"], signal.SIGKILL)
        return [str(victim["name"])]

    return strike


def _stop(role: str) -> Strike:
    async def strike(status: Status, draws: random.Random) -> list[str]:
        victim = _pick(status, draws, role, "active")
        os.kill(victim["pid"], signal.SIGSTOP)
        asyncio.get_running_loop().call_later(STOPPED_S, _continue, victim["pid"])
        return [str(victim["name"])]

    return strike


def _continue(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
        os.kill(pid, signal.SIGCONT)


def _both(first: Strike, second: Strike, pause_s: float = 0.0) -> Strike:
    async def strike(status: Status, draws: random.Random) -> list[str]:
        struck = await first(status, draws)
        await asyncio.sleep(pause_s * draws.random())
        return struck + await second(status, draws)

    return strike


async def _kill_etcd(status: Status, draws: random.Random) -> list[str]:
    """The one that belongs to the same `serve` as the first service."""
    parent = _parent(status["services"][0]["pid"])
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or _parent(int(entry.name)) != parent:
            continue
        if b"--listen-client-urls" in (entry / "cmdline").read_bytes():
            os.kill(int(entry.name), signal.SIGKILL)
            return []
    raise LookupError("this system's etcd is not a process of its own here")


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


TWO_STAGES = ("--prompt-stages", "2", "--token-stages", "2")
FAULTS: dict[str, Fault] = {
    "token-kill": Fault(
        "kill -9 of a token stage, a standby is there", _kill("token_stage"), (*TWO_STAGES, "--standbys", "1"), 4
    ),
    "token-kill-alone": Fault("kill -9 of a token stage, no standby", _kill("token_stage"), TWO_STAGES, 4),
    "prompt-kill": Fault("kill -9 of a prompt stage", _kill("prompt_stage"), (*TWO_STAGES, "--standbys", "1"), 4),
    "token-stop": Fault(
        f"SIGSTOP of a token stage, SIGCONT {STOPPED_S:g} s later", _stop("token_stage"), ("--standbys", "1"), 4
    ),
    "token-stop-no-kill": Fault(
        "the same, and nobody kills the stopped one: it wakes up",
        _stop("token_stage"),
        ("--standbys", "1", "--no-kill"),
        4,
    ),
    "store-kill": Fault("kill -9 of a cache store", _kill("cache_store"), ("--cache-stores", "2"), 0),
    "router-kill": Fault("kill -9 of the leading router", _kill("router", "leader"), ("--routers", "2"), 4),
    "etcd-kill": Fault("kill -9 of etcd, which is started again", _kill_etcd, (), 0),
    "token-and-store": Fault(
        "kill -9 of a token stage and a store within 0.5 s",
        _both(_kill("token_stage"), _kill("cache_store"), 0.5),
        ("--standbys", "1", "--cache-stores", "2"),
    ),
    "token-and-router": Fault(
        "kill -9 of a token stage and the leading router within 0.5 s",
        _both(_kill("token_stage"), _kill("router", "leader"), 0.5),
        ("--standbys", "1", "--routers", "2"),
    ),
}
