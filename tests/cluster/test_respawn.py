"""What `serve` starts comes back: a stage without importing torch again, etcd with its data on its port."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dejavu import AsyncClient
from tests.cluster.system import System, descendants, running
from tests.cluster.test_serving import FLOAT32, GREEDY, prompts

pytestmark = pytest.mark.cluster


def process_below(system: System, words: str) -> int:
    """The one process of the system whose command line has these words."""
    found = [
        pid
        for pid in descendants(system.process.pid)
        if words in Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode()
    ]
    assert len(found) == 1, found
    return found[0]


async def services_by_name(client: AsyncClient) -> dict[str, dict[str, Any]]:
    return {service["name"]: service for service in (await client.status())["services"]}


async def replaced(client: AsyncClient, name: str, pid: int) -> dict[str, Any]:
    """The service once it is another process (bounded by the test's timeout)."""
    while (service := (await services_by_name(client)).get(name)) is None or service["pid"] == pid:
        pass
    return service


async def test_etcd_nursery_and_stage_come_back() -> None:
    prompt = prompts(2, [40])[0]
    with running(*FLOAT32) as system:
        etcd, nursery = process_below(system, "--listen-client-urls"), process_below(system, "deploy.nursery")
        async with AsyncClient(system.endpoint) as client:
            expected = (await client.generate(prompt, GREEDY)).token_ids
            os.kill(etcd, signal.SIGKILL)
            assert (await client.generate(prompt, GREEDY)).token_ids == expected
            stage = (await services_by_name(client))["token-0-stage-0"]
            os.kill(stage["pid"], signal.SIGKILL)
            assert (await client.generate(prompt, GREEDY)).token_ids == expected
            following = await replaced(client, "token-0-stage-0", stage["pid"])
            assert following["incarnation"] != stage["incarnation"]
            assert process_below(system, "--listen-client-urls") != etcd
            os.kill(nursery, signal.SIGKILL)
            os.kill(following["pid"], signal.SIGKILL)
            assert (await client.generate(prompt, GREEDY)).token_ids == expected
            await replaced(client, "token-0-stage-0", following["pid"])
        log = system.log()
    assert "the nursery is gone" in log and "etcd ended with -9" in log
