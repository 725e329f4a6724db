"""Greedy streams that run while something happens to their system."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from typing import Self

import pytest

from dejavu import AsyncClient, SamplingParams
from dejavu.errors import Unavailable
from tests.cluster.reference import assert_greedy
from tests.cluster.system import TINY, System

NUM_TOKENS = 250
LONG = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
_SHORT_TOKENS, _WELL_ON_TOKENS = 5, 60


class Streams:
    """One of each prompt."""

    def __init__(self, client: AsyncClient, work: Sequence[list[int]]) -> None:
        self._got_on: asyncio.Queue[None] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._run(client, prompt)) for prompt in work]

    @classmethod
    async def begin(cls, client: AsyncClient, work: Sequence[list[int]]) -> Self:
        """Returns when all have some tokens."""
        streams = cls(client, work)
        await streams.get_on()
        return streams

    async def get_on(self) -> None:
        """Returns, once more, when they have got on."""
        for _ in self._tasks:
            await self._got_on.get()

    async def ended(self) -> list[list[int]]:
        """The tokens of each."""
        return await asyncio.gather(*self._tasks)

    async def _run(self, client: AsyncClient, prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        async for token in client.stream(prompt, LONG):
            tokens.append(token.id)
            if len(tokens) in (_SHORT_TOKENS, _WELL_ON_TOKENS):
                self._got_on.put_nowait(None)
        return tokens


def check(work: Sequence[list[int]], answers: Sequence[list[int]]) -> None:
    """Each has the tokens that it would have had if nothing had happened."""
    for prompt, tokens in zip(work, answers, strict=True):
        assert len(tokens) == NUM_TOKENS
        assert_greedy(TINY, prompt, tokens)


async def end_in_order(system: System, number: signal.Signals, work: Sequence[list[int]]) -> None:
    """What is live may finish before the end that the signal asks for, and nothing new begins."""
    async with AsyncClient(system.endpoint) as client:
        streams = await Streams.begin(client, work)
        system.process.send_signal(number)
        with pytest.raises(Unavailable, match="stopping"):
            while True:  # until the signal has got about
                await client.generate("late", SamplingParams(max_tokens=1))
        answers = await streams.ended()
    assert await asyncio.to_thread(system.process.wait, 10) == 0
    check(work, answers)
