"""When a process may believe that absent keys mean absent members, on a virtual clock."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from common.etcd.lease import Lease
from tests.unit.simulated_etcd import SimulatedClient, SimulatedEtcd
from tests.unit.virtual_time import Process, run_virtually

TTL_S = 3.0
SOON_S = 1.1
"""A lease is renewed, or taken anew, within this time once that is possible."""


def with_lease(act: Callable[[SimulatedEtcd, Process, Lease], Awaitable[None]]) -> None:
    """Has a process keep a lease for ten seconds, then acts."""

    async def main() -> None:
        etcd = SimulatedEtcd(random.Random(0), lambda process, operations: None)
        expiry = asyncio.create_task(etcd.expire())
        process = Process("a", "1-1", 1)
        lease = Lease(SimulatedClient(etcd, process), TTL_S)
        await lease.grant()
        keeping = process.start(lease.keep())
        await asyncio.sleep(10.0)
        try:
            await act(etcd, process, lease)
        finally:
            keeping.cancel()
            expiry.cancel()

    run_virtually(main())


def is_settled(etcd: SimulatedEtcd, lease: Lease) -> bool:
    return lease.settled_at_s() <= etcd.now_s


def test_who_has_renewed_for_a_while_believes_what_it_sees() -> None:
    async def act(etcd: SimulatedEtcd, process: Process, lease: Lease) -> None:
        assert is_settled(etcd, lease)

    with_lease(act)


def test_a_new_process_gives_everybody_one_time_to_live() -> None:
    async def act(etcd: SimulatedEtcd, process: Process, lease: Lease) -> None:
        newcomer = Lease(SimulatedClient(etcd, process), TTL_S)
        await newcomer.grant()
        assert TTL_S - 0.1 < newcomer.settled_at_s() - etcd.now_s <= TTL_S

    with_lease(act)


def test_an_outage_is_followed_by_one_time_to_live() -> None:
    async def act(etcd: SimulatedEtcd, process: Process, lease: Lease) -> None:
        etcd.go_down()
        await asyncio.sleep(2 * TTL_S)
        assert not is_settled(etcd, lease)
        etcd.come_up(was_stopped=False)
        await asyncio.sleep(TTL_S - 0.1)
        assert not is_settled(etcd, lease)
        await asyncio.sleep(SOON_S + 0.1)
        assert is_settled(etcd, lease)

    with_lease(act)


def test_who_wakes_up_without_its_lease_gives_everybody_one_time_to_live() -> None:
    """It has slept through an outage, for all it knows."""

    async def act(etcd: SimulatedEtcd, process: Process, lease: Lease) -> None:
        lost = lease.id
        process.stop()
        await asyncio.sleep(2 * TTL_S)
        process.go_on()
        assert lost not in etcd.leases
        assert not is_settled(etcd, lease)
        await asyncio.sleep(SOON_S)
        assert lease.id not in (0, lost)
        assert not is_settled(etcd, lease)
        await asyncio.sleep(TTL_S)
        assert is_settled(etcd, lease)

    with_lease(act)
