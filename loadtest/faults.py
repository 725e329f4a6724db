"""The faults that `loadtest.chaos` knows: how the system is started for them, and what is done to whom."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.fault_hooks import LOOP_SIGNAL, STEP_SIGNAL

Status = Mapping[str, Any]
Strike = Callable[[Status, random.Random], Awaitable[list[str]]]
"""Does it; returns the names of the services that were struck."""

STOPPED_S = 10.0
OUTAGE_S = 60.0
CORRUPTION_STRIDE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Fault:
    """`max_recomputed_tokens` is per stream; None: no bound."""

    what: str
    strike: Strike
    arguments: tuple[str, ...] = ()
    max_recomputed_tokens: int | None = None
    lasts_s: float = 0.0
    """streams are run again and again until it is over"""


def _pick(status: Status, draws: random.Random, role: str, state: str) -> Mapping[str, Any]:
    found = [s for s in status["services"] if s["role"] == role and s["state"] == state]
    if not found:
        raise LookupError(f"no {role} is {state}")
    picked: Mapping[str, Any] = draws.choice(found)
    return picked


def _signal(number: int, role: str, state: str = "active") -> Strike:
    async def strike(status: Status, draws: random.Random) -> list[str]:
        victim = _pick(status, draws, role, state)
        os.kill(victim["pid"], number)
        return [str(victim["name"])]

    return strike


def _kill(role: str, state: str = "active") -> Strike:
    return _signal(signal.SIGKILL, role, state)


def _stop(role: str, state: str = "active") -> Strike:
    async def strike(status: Status, draws: random.Random) -> list[str]:
        victim = _pick(status, draws, role, state)
        os.kill(victim["pid"], signal.SIGSTOP)
        asyncio.get_running_loop().call_later(STOPPED_S, _continue, victim["pid"])
        return [str(victim["name"])]

    return strike


async def _kill_both_tokens(status: Status, draws: random.Random) -> list[str]:
    victims = [s for s in status["services"] if s["role"] == "token_stage" and s["state"] == "active"]
    for victim in victims:
        await asyncio.sleep(0.2 * draws.random())
        os.kill(victim["pid"], signal.SIGKILL)
    return [str(victim["name"]) for victim in victims]


async def _kill_successor(status: Status, draws: random.Random) -> list[str]:
    """A token stage, and then the standby that is taking its place."""
    first = _pick(status, draws, "token_stage", "active")
    spares = [s for s in status["services"] if s["role"] == "standby" and s["name"].startswith(first["name"])]
    os.kill(first["pid"], signal.SIGKILL)
    await asyncio.sleep(0.4 * draws.random())
    os.kill(spares[0]["pid"], signal.SIGKILL)
    return [str(first["name"]), str(spares[0]["name"])]


async def _corrupt_store(status: Status, draws: random.Random) -> list[str]:
    """Flips bytes all over a store's memory, then kills a token stage, whose KV must come back."""
    store = _pick(status, draws, "cache_store", "active")
    for entry in Path(f"/proc/{store['pid']}/fd").iterdir():
        if not os.readlink(entry).startswith("/memfd:"):
            continue
        with entry.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            for position in range(0, len(memory), CORRUPTION_STRIDE_BYTES):
                memory[position] ^= 0xFF
    return await _kill("token_stage")(status, draws)


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
    os.kill(_etcd_of(status), signal.SIGKILL)
    return []


async def _stop_etcd(status: Status, draws: random.Random) -> list[str]:
    pid = _etcd_of(status)
    os.kill(pid, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(OUTAGE_S, _continue, pid)
    return []


def _etcd_of(status: Status) -> int:
    """The pid of the one that belongs to the same `serve` as the first service."""
    parent = _parent(status["services"][0]["pid"])
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or _parent(int(entry.name)) != parent:
            continue
        if b"--listen-client-urls" in (entry / "cmdline").read_bytes():
            return int(entry.name)
    raise LookupError("this system's etcd is not a process of its own here")


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


CHUNK_TOKENS = 256
"""`--chunk-size` of `dejavu serve`"""
TWO_STAGES = ("--prompt-stages", "2", "--token-stages", "2")
FAULTS: dict[str, Fault] = {
    "token-kill": Fault(
        "kill -9 of a token stage, a standby is there", _kill("token_stage"), (*TWO_STAGES, "--standbys", "1"), 4
    ),
    "token-kill-alone": Fault("kill -9 of a token stage, no standby", _kill("token_stage"), TWO_STAGES, 4),
    "prompt-kill": Fault(
        "kill -9 of a prompt stage", _kill("prompt_stage"), (*TWO_STAGES, "--standbys", "1"), CHUNK_TOKENS
    ),
    "prompt-stop": Fault(
        f"SIGSTOP of a prompt stage, SIGCONT {STOPPED_S:g} s later",
        _stop("prompt_stage"),
        ("--standbys", "1"),
        CHUNK_TOKENS,
    ),
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
    "router-kill": Fault("kill -9 of the leading router", _kill("router", "leader"), ("--routers", "2"), 0),
    "router-stop": Fault(
        f"SIGSTOP of the leading router, SIGCONT {STOPPED_S:g} s later",
        _stop("router", "leader"),
        ("--routers", "2"),
        0,
    ),
    "stuck-loop": Fault(
        "the event loop of a token stage stands still", _signal(LOOP_SIGNAL, "token_stage"), ("--standbys", "1"), 4
    ),
    "stuck-step": Fault(
        "the compute thread of a token stage stands still",
        _signal(STEP_SIGNAL, "token_stage"),
        ("--standbys", "1"),
        4,
    ),
    "etcd-kill": Fault("kill -9 of etcd, which is started again", _kill_etcd, (), 0),
    "etcd-outage": Fault(f"etcd stands still for {OUTAGE_S:g} s", _stop_etcd, (), 0, OUTAGE_S),
    "two-tokens": Fault(
        "kill -9 of both token stages within 0.4 s", _kill_both_tokens, (*TWO_STAGES, "--standbys", "1")
    ),
    "token-and-prompt": Fault(
        "kill -9 of a token and a prompt stage within 0.5 s",
        _both(_kill("token_stage"), _kill("prompt_stage"), 0.5),
        (*TWO_STAGES, "--standbys", "1"),
    ),
    "successor": Fault(
        "kill -9 of a token stage, and within 0.4 s of the standby that takes its place",
        _kill_successor,
        (*TWO_STAGES, "--standbys", "1"),
    ),
    "store-corrupt": Fault(
        "a store's memory is damaged all over, then kill -9 of a token stage", _corrupt_store, ("--standbys", "1")
    ),
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
