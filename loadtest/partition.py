"""One service on a host of its own, as far as the network goes, and the way to it cut and mended without either end
hearing of it. Network namespaces do it, which need no privileges where the kernel allows users to have them.

    near (everything else) n0 ── m0 middle m1 ── f0 far (a token stage, or a cache store)

While the middle does not forward, packets vanish.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from dejavu import AsyncClient
from deploy.etcd_server import EtcdServer
from loadtest.strikes import Scene, Status, Strike
from loadtest.system import running_system

NEAR, FAR = "10.77.1.1", "10.77.2.1"
PARTITION_S = 10.0
FAR_STAGE, FAR_STORE = "token-0-stage-0-far", "cache-store-far"
INSIDE = "DEJAVU_NAMESPACES"
START_LIMIT_S = 60.0

_ROADS = f"""
mount -t tmpfs none /run; ip netns add middle; ip netns add far
ip link add n0 type veth peer name m0 netns middle; ip link add f0 netns far type veth peer name m1 netns middle
ip link set lo up; ip link set n0 up; ip addr add {NEAR}/24 dev n0; ip route add 10.77.2.0/24 via 10.77.1.2
ip -n middle link set m0 up; ip -n middle addr add 10.77.1.2/24 dev m0
ip -n middle link set m1 up; ip -n middle addr add 10.77.2.2/24 dev m1
ip -n far link set lo up; ip -n far link set f0 up; ip -n far addr add {FAR}/24 dev f0
ip -n far route add 10.77.1.0/24 via 10.77.2.2
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
    return subprocess.run([*into, sys.executable, *arguments], env=os.environ | {INSIDE: "1"}, check=False).returncode


def divided_system(
    near: str, far: str, *options: str
) -> Callable[[Sequence[str], Mapping[str, str]], AbstractAsyncContextManager[str]]:
    """Like `running_system`, with one more service far away: what the one called `near` is, with more options. Call it
    inside."""
    return lambda arguments, environment: _divided_system(near, far, options, arguments, environment)


@contextlib.asynccontextmanager
async def _divided_system(
    near: str, far: str, options: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str]
) -> AsyncIterator[str]:
    _build_roads()
    with tempfile.TemporaryDirectory(prefix="dejavu-far-") as folder, EtcdServer(Path(folder, "etcd"), NEAR) as etcd:
        os.environ["DEJAVU_STATE_DIR"] = folder  # for our client's key
        own = ["--host", NEAR, "--etcd", etcd.url, "--state-dir", folder]
        async with running_system([*arguments, *own], environment) as endpoint:
            process = await _start_far(endpoint, folder, near, far, options)
            try:
                yield endpoint
            finally:
                with contextlib.suppress(ProcessLookupError):  # it has ended, which is another matter
                    process.kill()
                await process.wait()


async def move_far(client: AsyncClient) -> None:
    """The far stage does the work from now on, and the near one is back to stand by."""
    async with asyncio.timeout(START_LIMIT_S):
        while True:
            services = (await client.status())["services"]
            states = {service["name"]: service["state"] for service in services if service["pipeline"] == "token-0"}
            if states.get(FAR_STAGE) == "active":
                if "standby" in states.values():
                    return
            elif FAR_STAGE in states:
                await client.drain(next(name for name, state in states.items() if state == "active"))
            await asyncio.sleep(0.1)


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


def cut_off(far: str) -> Strike:
    """Nothing reaches the far service, and nothing of it reaches anybody, for ten seconds."""

    async def strike(scene: Scene) -> list[str]:
        _forward(False)
        asyncio.get_running_loop().call_later(PARTITION_S, _forward, True)
        return [far]

    return strike


async def _start_far(
    endpoint: str, state_dir: str, near: str, far: str, options: Sequence[str]
) -> asyncio.subprocess.Process:
    """A copy of the near one, on the other side, under another host's name."""
    async with AsyncClient(endpoint) as client:
        services = (await client.status())["services"]
    pid = next(service["pid"] for service in services if service["name"] == near)
    command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
    for option, value in (("--name", far), ("--host", FAR)):
        command[command.index(option) + 1] = value
    # its number must not mean anything here, or the router would take it for a neighbour and kill it
    elsewhere = ("unshare", "--uts", "--pid", "--fork", "--kill-child")
    away = ("nsenter", "--net=/run/netns/far", *elsewhere, "sh", "-c", 'hostname far && exec "$@"', "far")
    with Path(state_dir, "far.log").open("wb") as log:
        return await asyncio.create_subprocess_exec(
            *away, *command, *options, stdout=log, stderr=log, env=os.environ | {"DEJAVU_STATE_DIR": state_dir}
        )


def _build_roads() -> None:
    subprocess.run(["sh", "-ec", _ROADS], check=True)
    _forward(True)


def _forward(is_on: bool) -> None:
    write = f"echo {int(is_on)} > /proc/sys/net/ipv4/ip_forward"
    subprocess.run(["nsenter", "--net=/run/netns/middle", "sh", "-c", write], check=True)
