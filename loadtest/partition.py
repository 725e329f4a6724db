"""One or two services on hosts of their own, as far as the network goes, and the way to one, or between two, cut and
mended without either end hearing of it. Network namespaces do it, which need no privileges where the kernel allows
users to have them; they vanish with the processes in them, so that nothing has to be restored.

    near (everything else) n0 ── m1 middle m2 ── f0 far (a stage, a store or a router)
                                        m3 ── f0 farther (another one)

What the middle does not forward vanishes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu import AsyncClient
from deploy.etcd_server import EtcdServer
from deploy.running import ended_in_order, running_system
from loadtest.strikes import Scene, Status, Strike

NEAR = "10.77.1.1"
HOSTS = {"far": "10.77.2.1", "farther": "10.77.3.1"}
PARTITION_S = 10.0
FAR_STAGE, FAR_STORE = "token-0-stage-0-far", "cache-store-far"
FARTHER_STAGE, FAR_PROMPT, FAR_ROUTER = "token-0-stage-1-far", "prompt-0-stage-0-far", "router-far"
INSIDE = "DEJAVU_NAMESPACES"
START_LIMIT_S = 60.0

_ROADS = f"""
mount -t tmpfs none /run; ip netns add middle; ip link set lo up; ip -n middle link set lo up
ip link add n0 type veth peer name m1 netns middle; ip link set n0 up; ip addr add {NEAR}/24 dev n0
ip -n middle link set m1 up; ip -n middle addr add 10.77.1.2/24 dev m1; ip route add 10.77.0.0/16 via 10.77.1.2
"""
_ROAD = """
ip netns add {host}; ip link add f0 netns {host} type veth peer name m{number} netns middle
ip -n middle link set m{number} up; ip -n middle addr add 10.77.{number}.2/24 dev m{number}
ip -n {host} link set lo up; ip -n {host} link set f0 up; ip -n {host} addr add {address}/24 dev f0
ip -n {host} route add 10.77.0.0/16 via 10.77.{number}.2
"""


class NoNamespaces(Exception):
    """The kernel, or a missing tool, does not let us have them; the message says what was tried."""


def is_inside() -> bool:
    """Whether this process has namespaces of its own."""
    return os.environ.get(INSIDE) == "1"


def run_inside(arguments: Sequence[str]) -> int:
    """`python ARGUMENTS` with namespaces of its own; its exit code. Raises `NoNamespaces`."""
    into = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    tools = all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip"))
    if not tools or subprocess.run([*into, "true"], capture_output=True, check=False).returncode:
        raise NoNamespaces(f"{' '.join(into)}, nsenter and ip must work for a partition")
    with ended_in_order():
        inside = subprocess.Popen([*into, sys.executable, *arguments], env=os.environ | {INSIDE: "1"})
        try:
            return inside.wait()
        finally:
            inside.terminate()  # it has ended, unless we are to
            inside.wait()


@dataclass(frozen=True, slots=True)
class Away:
    """A service on one of the `HOSTS`: what the one called `near` is, under another name and with more options."""

    near: str
    name: str
    options: tuple[str, ...] = ()
    host: str = "far"


def divided_system(
    *away: Away,
) -> Callable[[Sequence[str], Mapping[str, str]], AbstractAsyncContextManager[str]]:
    """Like `running_system`, with these services more. Call it inside."""
    return lambda arguments, environment: _divided_system(away, arguments, environment)


@contextlib.asynccontextmanager
async def _divided_system(
    away: Sequence[Away], arguments: Sequence[str], environment: Mapping[str, str]
) -> AsyncIterator[str]:
    _build_roads()
    with tempfile.TemporaryDirectory(prefix="dejavu-far-") as folder, EtcdServer(Path(folder, "etcd"), NEAR) as etcd:
        os.environ["DEJAVU_STATE_DIR"] = folder  # for our client's key
        own = ["--host", NEAR, "--etcd", etcd.url, "--state-dir", folder]
        async with running_system([*arguments, *own], environment) as endpoint, contextlib.AsyncExitStack() as stack:
            for each in away:
                stack.push_async_callback(_end, await _start_away(endpoint, folder, each))
            yield endpoint


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, which is another matter
        process.kill()
    await process.wait()


def move_away(*names: str) -> Callable[[AsyncClient], Awaitable[None]]:
    """Those that are away do the work from now on (a router leads), and what did it before is back to stand by."""

    async def prepare(client: AsyncClient) -> None:
        async with asyncio.timeout(START_LIMIT_S):
            while moves := _moves((await client.status())["services"], names):
                for name in filter(None, moves):
                    await client.drain(name)
                await asyncio.sleep(0.1)

    return prepare


def _moves(services: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Whom to drain; "" for what has to be waited for."""
    moves = []
    known = {service["name"]: service for service in services}
    for name in names:
        others = [] if name not in known else [other for other in services if _is_instead(other, known[name])]
        if not others:
            moves.append("")
            continue
        at_work = "leader" if known[name]["role"] == "router" else "active"
        if known[name]["state"] != at_work:
            moves.append(next((other["name"] for other in others if other["state"] == at_work), ""))
    return moves


def _is_instead(other: Mapping[str, Any], service: Mapping[str, Any]) -> bool:
    """Whether it could do, or does, the service's work. (Spares have a role of their own.)"""
    if service["pipeline"] is None:
        is_same = other["role"] == service["role"]
    else:
        is_same = (other["pipeline"], other["stage_index"]) == (service["pipeline"], service["stage_index"])
    return bool(is_same and other["name"] != service["name"])


async def use_far_store(client: AsyncClient) -> None:
    """Returns when all stores, the far one too, are given copies."""
    async with asyncio.timeout(START_LIMIT_S):
        while not has_far_store(await client.status()):  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(0.1)


def has_far_store(status: Status) -> bool:
    """Whether token drivers give copies to all stores, and the far one is among them."""
    stores = [service["name"] for service in status["services"] if service["role"] == "cache_store"]
    drivers = [service["replication"]["stores"] for service in status["services"] if "replication" in service]
    return FAR_STORE in stores and set(drivers) == {len(stores)}


def cut_off(name: str) -> Strike:
    """Nothing reaches the far service, and nothing of it reaches anybody, for ten seconds."""

    async def strike(scene: Scene) -> list[str]:
        _forward(False)
        asyncio.get_running_loop().call_later(PARTITION_S, _forward, True)
        return [name]

    return strike


def cut_between(*may_be_missed: str) -> Strike:
    """Nothing passes between the two services that are away, while all others reach both, for ten seconds."""

    async def strike(scene: Scene) -> list[str]:
        _part("add")
        asyncio.get_running_loop().call_later(PARTITION_S, _part, "del")
        return list(may_be_missed)

    return strike


async def _start_away(endpoint: str, state_dir: str, away: Away) -> asyncio.subprocess.Process:
    """A copy of the near one, on the other side, under another host's name."""
    async with AsyncClient(endpoint) as client:
        services = (await client.status())["services"]
    pid = next(service["pid"] for service in services if service["name"] == away.near)
    command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
    for option, value in (("--name", away.name), ("--host", HOSTS[away.host])):
        command[command.index(option) + 1] = value
    if "--cores" in command:  # one host's share of its processors is nobody else's
        command[command.index("--cores") + 1] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    # its number must not mean anything here, or the router would take it for a neighbour and kill it
    elsewhere = ("unshare", "--uts", "--pid", "--fork", "--kill-child")
    into = ("nsenter", f"--net=/run/netns/{away.host}", *elsewhere)
    with Path(state_dir, f"{away.host}.log").open("wb") as log:
        return await asyncio.create_subprocess_exec(
            *into, "sh", "-c", f'hostname {away.host} && exec "$@"', away.host, *command, *away.options,
            stdout=log, stderr=log, env=os.environ | {"DEJAVU_STATE_DIR": state_dir},
        )  # fmt: skip


def _build_roads() -> None:
    roads = [_ROAD.format(number=number, host=host, address=HOSTS[host]) for number, host in enumerate(HOSTS, 2)]
    subprocess.run(["sh", "-ec", "".join([_ROADS, *roads])], check=True)
    _forward(True)


def _forward(is_on: bool) -> None:
    write = f"echo {int(is_on)} > /proc/sys/net/ipv4/ip_forward"
    subprocess.run(["nsenter", "--net=/run/netns/middle", "sh", "-c", write], check=True)


def _part(verb: str) -> None:
    """`verb` "add": what one of the two sends to the other is dropped on the way; "del": no longer."""
    for source, destination in itertools.permutations(HOSTS.values(), 2):
        rule = ["rule", verb, "from", source, "to", destination, "blackhole"]
        subprocess.run(["ip", "-n", "middle", *rule], check=True)
