"""The streams that runs with faults follow: the same prompts each time, every token with the time it came."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from typing import Any

from dejavu import AsyncClient, SamplingParams
from dejavu.errors import DejavuError
from loadtest.history import Stream

PROMPT_TOKENS = (8, 40, 90, 180, 400)
QUIET_LIMIT_S = 30.0
SETTLE_LIMIT_S = 120.0

Work = list[tuple[list[int], SamplingParams]]


def make_work(seed: int, num_streams: int, num_tokens: int) -> Work:
    """Greedy and seeded streams, half and half, with prompts of 8 to 400 tokens."""
    draws = random.Random(seed)
    work = []
    for index in range(num_streams):
        prompt = [draws.randrange(3, 1000) for _ in range(draws.choice(PROMPT_TOKENS))]
        temperature = 0.0 if index % 2 == 0 else 0.8
        params = SamplingParams(temperature=temperature, seed=index, max_tokens=num_tokens, ignore_eos=True)
        work.append((prompt, params))
    return work


async def run_undisturbed(client: AsyncClient, work: Work) -> list[Stream]:
    """All at once, without a fault. Raises `RuntimeError` where one does not finish."""
    streams = [Stream(str(index), []) for index in range(len(work))]
    await asyncio.gather(*(follow(client, s, *each) for s, each in zip(streams, work, strict=True)))
    for stream in streams:
        if stream.ended != "finished":
            raise RuntimeError(f"stream {stream.name} without a fault: {stream.ended}")
    return streams


def expecting(streams: Sequence[Stream]) -> list[Stream]:
    """Empty streams that should deliver what these did."""
    return [Stream(stream.name, [token_id for _, _, token_id in stream.tokens]) for stream in streams]


async def follow(client: AsyncClient, stream: Stream, prompt: list[int], params: SamplingParams) -> None:
    """Notes what comes, and how it ends."""
    try:
        async for token in client.stream(prompt, params):
            stream.tokens.append((time.monotonic(), token.index, token.id))
        stream.ended = "finished"
    except DejavuError as error:
        stream.ended = f"{type(error).__name__}: {error}"


async def quiet(client: AsyncClient) -> dict[str, Any]:
    """The status once nothing is live and all blocks are back, or after the limit."""
    deadline_s = time.monotonic() + QUIET_LIMIT_S
    while True:
        status = await client.status()
        blocks = [service["kv_blocks"] for service in status["services"] if "kv_blocks" in service]
        is_quiet = not status["live"]["sequences"] and all(b["free"] == b["total"] for b in blocks)
        if is_quiet or time.monotonic() > deadline_s:
            return status
        await asyncio.sleep(0.1)


async def settled(client: AsyncClient, num_services: int) -> None:
    """Returns when all services are back: every run begins with a healthy system. Raises `TimeoutError`."""
    async with asyncio.timeout(SETTLE_LIMIT_S):
        while len((await client.status())["services"]) < num_services:  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(0.1)


async def cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancels them and returns when they have ended."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
