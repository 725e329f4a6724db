"""A device that holds two microbatches serves as many sequences as the host holds, with the same tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from dejavu import AsyncClient, SamplingParams
from tests.cluster.reference import assert_greedy, assert_seeded
from tests.cluster.streams import LONG, Streams, check
from tests.cluster.system import TINY, System, pid_of, running
from tests.cluster.test_serving import FLOAT32, generate_all, prompts, settled_status

pytestmark = pytest.mark.cluster

LENGTHS = [1, 15, 16, 17, 33, 50, 64, 65, 100, 130, 120, 117]
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, seed=77, max_tokens=24, ignore_eos=True)
ON = (*FLOAT32, "--swap", "on", "--host-kv-memory", "48M")


def token_stages(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [service for service in status["services"] if service["role"] == "token_stage"]


@pytest.mark.parametrize(
    ("layout", "num_device_blocks"),
    [
        pytest.param(("--token-stages", "3", "--kv-memory", "1M"), 32, marks=pytest.mark.matrix),
        pytest.param(("--token-stages", "6", "--colocated", "--kv-memory", "512K"), 32, marks=pytest.mark.matrix),
        pytest.param(
            ("--token-split", "1,3,2", "--swap", "auto", "--kv-memory", "1536K"), 32, marks=pytest.mark.matrix
        ),
        pytest.param(("--token-stages", "1", "--kv-memory", "3M"), 32, marks=pytest.mark.matrix),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
async def test_tokens_are_the_same_through_a_small_device(layout: tuple[str, ...], num_device_blocks: int) -> None:
    """All sequences need about 80 blocks, the longest 11."""
    with running(*ON, *layout) as system:
        await check_small_device(system, num_device_blocks)


async def check_small_device(system: System, num_device_blocks: int) -> None:
    work = prompts(31, LENGTHS)
    greedy = await generate_all(system.endpoint, work, GREEDY)
    seeded = await generate_all(system.endpoint, work[-6:], SEEDED)
    status = await settled_status(system.endpoint)
    for prompt, token_ids in zip(work, greedy, strict=True):
        assert len(token_ids) == GREEDY.max_tokens
        assert_greedy(TINY, prompt, token_ids)
    for prompt, token_ids in zip(work[-6:], seeded, strict=True):
        assert_seeded(TINY, prompt, token_ids, SEEDED)
    for stage in token_stages(status):
        assert stage["device_kv_blocks"]["peak"] <= stage["device_kv_blocks"]["total"]
        assert min(s["device_kv_blocks"]["total"] for s in token_stages(status)) == num_device_blocks
        assert stage["swapped_in_bytes"] > 0
    assert next(s["swap"]["peak_need_blocks"] for s in token_stages(status) if "swap" in s) >= num_device_blocks


@pytest.mark.parametrize("num_stages", [3, *(pytest.param(n, marks=pytest.mark.matrix) for n in (4, 6))])
async def test_the_device_holds_two_of_the_microbatches(num_stages: int) -> None:
    """There is room for more, but the peak stays at 2 / stages of what all need, and a block per sequence."""
    work = prompts(32, [48] * 12)
    splits = {3: "2,2,2", 4: "2,2,1,1", 6: "1,1,1,1,1,1"}
    with running(*ON, "--kv-memory", "8M", "--token-split", splits[num_stages]) as system:
        await generate_all(system.endpoint, work, GREEDY)
        status = await settled_status(system.endpoint)
    stages = token_stages(status)
    need = next(s["swap"]["peak_need_blocks"] for s in stages if "swap" in s)
    for stage in stages:
        assert 0 < stage["device_kv_blocks"]["peak"] <= 2 / num_stages * need + len(work), (stage, need)


async def test_a_stage_killed_while_swapping() -> None:
    """Tokens are the same through a small device. Then the host pool dies with its stage; the streams go on from the
    store, through the device again."""
    work = prompts(33, [10, 40, 70, 33, 90, 20])
    with running(*ON, "--token-stages", "3", "--kv-memory", "1536K") as system:
        await check_small_device(system, 48)
        async with AsyncClient(system.endpoint) as client:
            streams = Streams(client, work)
            cancelled = asyncio.ensure_future(client.generate(prompts(34, [60])[0], LONG))
            await streams.get_on()
            cancelled.cancel()
            os.kill(await pid_of(client, "token-0-stage-1"), signal.SIGKILL)
            answers = await streams.ended()
        status = await settled_status(system.endpoint)
    assert status["counters"]["recoveries"] >= len(work)
    check(work, answers)


async def test_ten_times_more_than_the_device_holds() -> None:
    """Nobody fails, nobody starves, and the decision can be read."""
    work = prompts(35, [30] * 60)
    with running(*FLOAT32, "--token-stages", "3", "--kv-memory", "768K", "--host-kv-memory", "12M") as system:
        tokens = await generate_all(system.endpoint, work, GREEDY)
        status = await settled_status(system.endpoint)
    for prompt, token_ids in zip(work, tokens, strict=True):
        assert_greedy(TINY, prompt, token_ids)
    decision = next(stage["swap"] for stage in token_stages(status) if "swap" in stage)
    assert decision["decision"] in ("swapping", "resident") and decision["gain"] > 0
