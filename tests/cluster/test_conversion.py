"""Pipelines change their roles while everything is being served."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Collection
from typing import Any

import msgspec
import pytest

from dejavu import AsyncClient, SamplingParams
from dejavu.errors import InvalidParameter, Unavailable
from tests.cluster.reference import assert_greedy, assert_seeded
from tests.cluster.system import ROOT, TINY, running
from tests.cluster.test_serving import FLOAT32, prompts, settled_status

pytestmark = pytest.mark.cluster

NUM_TOKENS = 100
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
ONE = msgspec.structs.replace(GREEDY, max_tokens=1)
SEEDED = msgspec.structs.replace(GREEDY, temperature=0.8, seed=5)
WORK = list(zip(prompts(31, [10, 300, 70, 33, 500, 20]), [GREEDY, SEEDED] * 3, strict=True))


class Streams:
    """Streams that run, and how far the last ones that were begun are."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._tasks: list[asyncio.Task[list[int]]] = []

    async def begin(self) -> None:
        """Returns when all new ones have shown some tokens."""
        started: asyncio.Queue[int] = asyncio.Queue()
        self._tasks += [asyncio.create_task(self._run(prompt, params, started)) for prompt, params in WORK]
        for _ in WORK:
            await started.get()

    async def _run(self, prompt: list[int], params: SamplingParams, started: asyncio.Queue[int]) -> list[int]:
        tokens: list[int] = []
        async for token in self._client.stream(prompt, params):
            tokens.append(token.id)
            if len(tokens) == 5:
                started.put_nowait(1)
        return tokens

    async def check(self) -> None:
        """All end with the tokens that they would have had."""
        answers = await asyncio.gather(*self._tasks)
        assert all(len(tokens) == NUM_TOKENS for tokens in answers)
        for (prompt, params), tokens in zip(WORK, answers[: len(WORK)], strict=True):
            if params is GREEDY:
                assert_greedy(TINY, prompt, tokens)
            else:
                assert_seeded(TINY, prompt, tokens, params)
        assert answers == answers[: len(WORK)] * (len(answers) // len(WORK))


def stages(status: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {service["name"]: service for service in status["services"] if service["stage_index"] is not None}


async def settled_pipelines(
    client: AsyncClient, *allowed: set[str], dead: Collection[int] = ()
) -> dict[str, dict[str, Any]]:
    """The stages once exactly these pipelines are ready, without these processes (asserted by the test's timeout)."""
    while True:
        status = await client.status()
        now = stages(status)
        is_ready = {pipeline["name"] for pipeline in status["pipelines"] if pipeline["ready"]} in allowed
        if is_ready and not any(stage["pid"] in dead for stage in now.values()):
            return now


async def test_pipelines_change_their_roles_under_load() -> None:
    layout = ("--prompt-pipelines", "2", "--token-pipelines", "2", "--token-split", "2,4")
    with running(*FLOAT32, *layout) as system:
        async with AsyncClient(system.endpoint) as client, AsyncClient(system.endpoint) as operator:
            before = stages(await operator.status())
            streams = Streams(client)
            await streams.begin()
            assert await operator.convert("prompt-1", "token") == "token-3"
            await streams.begin()
            assert await operator.convert("token-0", "prompt") == "prompt-2"
            assert await operator.convert("token-0", "prompt") == "prompt-2", "it has been done"
            await streams.begin()
            now = await settled_pipelines(operator, {"prompt-0", "prompt-2", "token-1", "token-3"})
            changed = {"token-3-stage-0": "prompt-1-stage-0"} | {
                f"prompt-2-stage-{i}": f"token-0-stage-{i}" for i in (0, 1)
            }
            for name, earlier in changed.items():
                assert now[name]["role"] == ("token_stage" if name.startswith("token") else "prompt_stage")
                same = ("pid", "layers", "stage_index", "num_stages", "host")
                assert [now[name][each] for each in same] == [before[earlier][each] for each in same]
                assert now[name]["incarnation"] != before[earlier]["incarnation"]

            dead = [now[name]["pid"] for name in ("token-3-stage-0", "prompt-2-stage-1")]
            for pid in dead:
                os.kill(pid, signal.SIGKILL)
            after = await settled_pipelines(operator, {"prompt-0", "prompt-2", "token-1", "token-3"}, dead=dead)
            assert {name: stage["role"] for name, stage in after.items()} == {n: s["role"] for n, s in now.items()}

            command = [sys.executable, "-m", "dejavu", "convert", "token-3", "prompt", "--endpoint", system.endpoint]
            process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
            assert (await process.communicate())[0] == b"token-3 is now prompt-1\n"
            await streams.check()
        status = await settled_status(system.endpoint)
    assert status["counters"].get("requests_failed", 0) == 0


async def test_a_role_that_a_pipeline_had_before_is_taken_at_once_and_the_last_of_a_role_stays() -> None:
    """The end of its first life in it is still published: newer is that of the other role."""
    with running(*FLOAT32, "--token-pipelines", "2") as system:
        async with AsyncClient(system.endpoint) as client:
            with pytest.raises(InvalidParameter, match="no pipeline of this name: prompt-0, token-0, token-1"):
                await client.convert("prompt-7", "token")
            with pytest.raises(InvalidParameter, match="must be prompt or token"):
                await client.convert("prompt-0", "router")
            with pytest.raises(InvalidParameter, match="is a prompt pipeline already"):
                await client.convert("prompt-0", "prompt")
            with pytest.raises(Unavailable, match="no other prompt pipeline is ready"):
                await client.convert("prompt-0", "token")
            name = "token-1"
            for role in ("prompt", "token", "prompt"):
                name = await client.convert(name, role)
            stage = stages(await client.status())[f"{name}-stage-0"]
            assert (name, stage["incarnation"].rpartition("-")[2]) == ("prompt-2", "3")
            with pytest.raises(Unavailable, match="no other token pipeline is ready"):
                await client.convert("token-0", "prompt")


async def test_deaths_in_the_middle_of_a_conversion_heal() -> None:
    """A stage of the pipeline, then the router that leads: it comes back in one of its roles, and nothing is lost."""
    layout = ("--prompt-pipelines", "2", "--token-stages", "2", "--routers", "2", "--prompt-stages", "2")
    with running(*FLOAT32, *layout) as system:
        async with AsyncClient(system.endpoint) as client, AsyncClient(system.endpoint) as operator:
            streams = Streams(client)
            await streams.begin()
            victim = stages(await operator.status())["prompt-1-stage-1"]["pid"]
            converting = asyncio.create_task(operator.convert("prompt-1", "token"))
            await client.generate([5], ONE)  # it is under way
            os.kill(victim, signal.SIGKILL)
            assert await converting == "token-2"
            await settled_pipelines(operator, {"prompt-0", "token-0", "token-2"})
            await streams.begin()

            leader = next(s for s in (await client.status())["services"] if s["state"] == "leader")
            converting = asyncio.create_task(operator.convert("token-2", "prompt"))
            await client.generate([5], ONE)  # it is under way
            os.kill(leader["pid"], signal.SIGKILL)
            with contextlib.suppress(Unavailable):  # the next one may not know yet that the others are ready
                assert await converting == "prompt-1"
            others = {"prompt-0", "token-0"}
            await settled_pipelines(client, others | {"prompt-1"}, others | {"token-2"})
            await streams.begin()
            await streams.check()
        await settled_status(system.endpoint)
