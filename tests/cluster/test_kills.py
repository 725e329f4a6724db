"""A killed process is replaced, and every stream goes on where it was, with the tokens it would have had."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dejavu import AsyncClient
from dejavu.errors import InvalidParameter
from tests.cluster.streams import LONG, Streams, check, end_in_order
from tests.cluster.system import System, pid_of, running
from tests.cluster.test_serving import FLOAT32, generate_all, prompts, settled_status

pytestmark = pytest.mark.cluster


async def gone(pid: int) -> None:
    """Returns when the process has ended."""
    async with asyncio.timeout(10):
        while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110 - not our child: there is nothing to wait on
            await asyncio.sleep(0.02)


async def test_streams_survive_the_only_router_standing_still() -> None:
    work = prompts(22, [10, 40])
    with running(*FLOAT32) as system:
        async with AsyncClient(system.endpoint) as client:
            streams = await Streams.begin(client, work)
            os.kill(await pid_of(client, "router-0"), signal.SIGSTOP)
            answers = await streams.ended()
        await settled_status(system.endpoint)
    check(work, answers)


@pytest.mark.parametrize(
    ("victim", "number", "layout"),
    [
        ("token-0-stage-1", signal.SIGKILL, ("--token-stages", "2", "--standbys", "1")),
        ("token-0-stage-0", signal.SIGSTOP, ("--colocated", "--standbys", "1")),
    ],
)
async def test_kv_comes_back_from_the_store(victim: str, number: int, layout: tuple[str, ...]) -> None:
    """Nearly nothing is computed again, and the spare goes on at once."""
    work = prompts(22, [10, 40, 70, 33])
    with running(*FLOAT32, *layout) as system:
        async with AsyncClient(system.endpoint) as client:
            streams = await Streams.begin(client, work)
            pid = await pid_of(client, victim)
            killed_at_s = time.monotonic()
            os.kill(pid, number)
            answers = await streams.ended()
            status = await client.status()
        await settled_status(system.endpoint)
    check(work, answers)
    counters = status["counters"]
    assert counters["recoveries"] == len(work)
    # a healthy system lags by a token or two, a starved one by more
    assert counters["recomputed_tokens"] <= 32 * len(work)
    detected = [e for e in status["events"] if e["kind"] == "detected" and e["service"] == victim]
    # a lease that lapses by itself takes longer
    assert 0 < detected[0]["at_monotonic_s"] - killed_at_s < 2


async def test_streams_outlive_their_router() -> None:
    """Token stages keep the sequences of a dead router for the next one: nothing is computed again."""
    work = prompts(25, [10, 40, 70, 33])
    with running(*FLOAT32, "--routers", "2", "--token-pipelines", "2") as system:
        async with AsyncClient(system.endpoint) as client:
            streams = await Streams.begin(client, work)
            os.kill(await pid_of(client, "leader"), signal.SIGKILL)
            answers = await streams.ended()
            status = await client.status()
        await settled_status(system.endpoint)
    check(work, answers)
    counters = status["counters"]
    assert counters.get("recoveries", 0) == counters.get("recomputed_tokens", 0) == 0


async def test_losses_and_replacements_where_every_role_has_a_spare() -> None:
    layout = ("--routers", "2", "--cache-stores", "2", "--token-stages", "2", "--standbys", "1")
    with running(*FLOAT32, *layout) as system:
        async with AsyncClient(system.endpoint) as client:
            num_services = len((await client.status())["services"])
        await lose_a_store_and_a_stage(system)
        await whole(system, num_services)
        await replace_one_by_one(system)


async def whole(system: System, num_services: int) -> None:
    """Returns when all are there again (bounded by the test's timeout)."""
    async with AsyncClient(system.endpoint) as client:
        while len((await client.status())["services"]) < num_services:
            pass


async def lose_a_store_and_a_stage(system: System) -> None:
    """Streams go on; what the lost store had is copied to the next one, which then serves a recovery."""
    work = prompts(23, [10, 40, 70])
    async with AsyncClient(system.endpoint) as client:
        streams = await Streams.begin(client, work)
        os.kill(await pid_of(client, "cache-store-0"), signal.SIGKILL)
        await streams.get_on()
        os.kill(await pid_of(client, "token-0-stage-0"), signal.SIGKILL)
        answers = await streams.ended()
        status = await client.status()
    await settled_status(system.endpoint)
    check(work, answers)
    assert status["counters"]["recoveries"] == len(work)


async def replace_one_by_one(system: System) -> None:
    """A rolling restart: every role is drained while streams run."""
    work = prompts(24, [10, 40, 70])
    async with AsyncClient(system.endpoint) as client, AsyncClient(system.endpoint) as operator:
        begun = []
        for name in ("token-0-stage-0", "prompt-0-stage-0", "cache-store-1", "router-0"):
            begun.append(await Streams.begin(client, work))
            pid = await pid_of(operator, name)
            await operator.drain(name)
            await gone(pid)
        with pytest.raises(InvalidParameter, match="no service of this name"):
            await operator.drain("nobody")
        answers = [await streams.ended() for streams in begun]
    await settled_status(system.endpoint)
    check(work, answers[0])
    assert answers == [answers[0]] * len(begun)


async def test_two_pipelines_that_do_both_kinds_of_work() -> None:
    with running(*FLOAT32, "--colocated", "--token-pipelines", "2", "--no-kill") as system:
        await lose_the_only_router(system)
        await lose_a_pipeline(system)


async def lose_the_only_router(system: System) -> None:
    """The next one finds every sequence where it was: in the other pipeline it would be read back from a copy."""
    work = prompts(26, [10, 40, 70, 33, 20, 50])
    async with AsyncClient(system.endpoint) as client:
        streams = await Streams.begin(client, work)
        await streams.get_on()
        os.kill(await pid_of(client, "router-0"), signal.SIGKILL)
        answers = await streams.ended()
        counters = (await client.status())["counters"]
        assert counters.get("recoveries", 0) == counters.get("recomputed_tokens", 0) == 0
    await settled_status(system.endpoint)
    check(work, answers)


async def lose_a_pipeline(system: System) -> None:
    """Streams leave it when it does not come back: its stage stands still, nobody may kill it, and there is no
    spare."""
    work = prompts(27, [10, 40, 70, 33])
    async with AsyncClient(system.endpoint) as client:
        streams = await Streams.begin(client, work)
        stopped = await pid_of(client, "token-1-stage-0")
        os.kill(stopped, signal.SIGSTOP)
        try:
            answers = await streams.ended()
        finally:
            os.kill(stopped, signal.SIGCONT)
    await settled_status(system.endpoint)
    check(work, answers)


async def test_prompts_leave_a_pipeline_that_does_not_come_back() -> None:
    """It was asked for them before anybody knew that it stands still."""
    work = prompts(28, [10, 40, 70, 33])
    with running(*FLOAT32, "--prompt-pipelines", "2", "--no-kill") as system:
        async with AsyncClient(system.endpoint) as client:
            stopped = await pid_of(client, "prompt-1-stage-0")
            os.kill(stopped, signal.SIGSTOP)
            try:
                answers = await generate_all(system.endpoint, work, LONG)
            finally:
                os.kill(stopped, signal.SIGCONT)
        await settled_status(system.endpoint)
    check(work, answers)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """One after the other of its processes is killed. Every test leaves it whole. (The last tests here: it runs until
    the end of the module.)"""
    with running(*FLOAT32, "--prompt-stages", "2", "--token-stages", "2") as started:
        yield started


@pytest.mark.parametrize("victim", ["token-0-stage-0", "token-0-stage-1", "prompt-0-stage-1", "router-0"])
async def test_streams_survive_a_kill(victim: str, system: System) -> None:
    work = prompts(21, [10, 40, 70, 33])
    async with AsyncClient(system.endpoint) as client:
        streams = await Streams.begin(client, work)
        pid = await pid_of(client, victim)
        os.kill(pid, signal.SIGKILL)
        more = asyncio.ensure_future(client.generate(work[0], LONG))
        answers = [*await streams.ended(), (await more).token_ids]
        assert await pid_of(client, victim) != pid
    await settled_status(system.endpoint)
    check([*work, work[0]], answers)


async def test_what_is_live_may_finish_before_the_end(system: System) -> None:
    """(The last test here.)"""
    await end_in_order(system, signal.SIGTERM, prompts(9, [5, 40]))
