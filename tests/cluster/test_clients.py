"""Clients that come back late, change their mind early, or want the same: every stream has its tokens, or its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from dejavu import AsyncClient, Client, SamplingParams
from dejavu.errors import RequestCancelled, RequestConflict
from dejavu.session import MAX_UNANSWERED_PINGS
from dejavu.wire import PING_INTERVAL_S
from services.router.requests import LONG_TEXT_CHARS
from tests.cluster.reference import assert_greedy
from tests.cluster.streams import end_in_order
from tests.cluster.system import TINY, System, pid_of, running
from tests.cluster.test_serving import FLOAT32, GREEDY, prompts, settled_status

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with running(*FLOAT32, "--no-kill") as started:
        yield started


async def test_a_client_that_was_thought_to_be_gone_gets_its_tokens(system: System) -> None:
    """A user who keeps the event loop busy for some seconds pings nobody. No prompt is computed meanwhile."""
    prompt = prompts(31, [40])[0]
    async with AsyncClient(system.endpoint) as client:
        stage = await pid_of(client, "prompt-0-stage-0")
        os.kill(stage, signal.SIGSTOP)
        try:
            answer = asyncio.ensure_future(client.generate(prompt, GREEDY))
            while not (await client.status())["live"]["requests"]:
                pass
            with Client(system.endpoint) as other:  # this is the user
                while not other.status()["counters"].get("requests_cancelled"):
                    pass
        finally:
            os.kill(stage, signal.SIGCONT)
        assert_greedy(TINY, prompt, (await answer).token_ids)
        assert (await client.status())["counters"]["requests_cancelled"] == 1
    await settled_status(system.endpoint)


async def test_a_client_on_another_connection_goes_on_where_it_was(system: System) -> None:
    """Its router stands still until it has given that up, and so does the token stage."""
    work = prompts(33, [10, 300])
    params = SamplingParams(temperature=0.0, max_tokens=600, ignore_eos=True)
    async with AsyncClient(system.endpoint) as client:
        pids = [await pid_of(client, name) for name in ("router-0", "token-0-stage-0")]
        before = (await client.status())["counters"]["recomputed_tokens"]
        streams = [client.stream(prompt, params) for prompt in work]
        begun = [[(await anext(stream)).id for _ in range(3)] for stream in streams]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep((MAX_UNANSWERED_PINGS + 2) * PING_INTERVAL_S)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        answers = [first + [token.id async for token in stream] for first, stream in zip(begun, streams, strict=True)]
        assert (await client.status())["counters"]["recomputed_tokens"] == before
    for prompt, tokens in zip(work, answers, strict=True):
        assert len(tokens) == 600
        assert_greedy(TINY, prompt, tokens)
    await settled_status(system.endpoint)


async def test_a_prompt_that_is_being_tokenised_can_be_cancelled(system: System) -> None:
    prompt = "Once upon a time there was " * (1 + LONG_TEXT_CHARS // 20)
    async with AsyncClient(system.endpoint) as client:
        answer = asyncio.ensure_future(client.generate(prompt, SamplingParams(max_tokens=900, ignore_eos=True), "r"))
        await asyncio.sleep(0)  # it is sent
        await client.cancel("r")
        with pytest.raises(RequestCancelled):
            await answer
    await settled_status(system.endpoint)


async def test_who_loses_a_request_to_another_client_hears_it(system: System) -> None:
    params = SamplingParams(max_tokens=400, seed=1, ignore_eos=True)
    prompt = prompts(32, [10])[0]
    async with AsyncClient(system.endpoint) as one, AsyncClient(system.endpoint) as other:
        stream = one.stream(prompt, params, "r")
        await anext(stream)
        answer = await other.generate(prompt, params, "r")
        with pytest.raises(RequestConflict, match="another client"):
            async for _ in stream:
                pass
    assert len(answer.token_ids) == 400
    await settled_status(system.endpoint)


async def test_what_is_live_may_finish_before_a_hangup_ends_everything(system: System) -> None:
    """(The last test here.)"""
    await end_in_order(system, signal.SIGHUP, prompts(9, [5, 40]))
