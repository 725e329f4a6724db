"""A member and candidate: `python -m tests.cluster.member_process URL CLUSTER NAME TTL_S`.

Says `member`, then `leader` once it leads. Every input line is a number of seconds to block its event loop.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from common.etcd.client import EtcdClient
from common.membership import Election, Membership
from tests.cluster.etcd_fixtures import member


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def report_lead(election: Election) -> None:
    async for leader in election.watch():
        if leader.is_me:
            say("leader")


def block_loop() -> None:
    line = sys.stdin.readline()
    if line:
        time.sleep(float(line))


async def main(url: str, cluster: str, name: str, ttl_s: str) -> None:
    async with EtcdClient(url) as client, Membership(client, cluster, float(ttl_s)) as membership:
        await membership.register(member(name, str(os.getpid())))
        say("member")
        asyncio.get_running_loop().add_reader(sys.stdin, block_loop)
        election = Election(client, cluster, membership.lease, name, "tcp://127.0.0.1:1")
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(election.campaign())
            tasks.create_task(report_lead(election))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
