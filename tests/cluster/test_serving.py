"""The whole system, real processes: the same tokens as transformers in every layout, nothing leaked, nothing left."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dejavu import AsyncClient, Client, SamplingParams
from dejavu.errors import InvalidParameter, PromptEmpty, PromptTooLong, TokenOutOfRange
from tests.cluster.reference import assert_greedy
from tests.cluster.system import ROOT, TINY, System, descendants, running

pytestmark = pytest.mark.cluster

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
FLOAT32 = ("--dtype", "float32", "--kv-memory", "64M")


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    draws = random.Random(seed)
    return [[draws.randrange(300, 4000) for _ in range(length)] for length in lengths]


async def generate_all(endpoint: str, work: list[list[int]], params: SamplingParams) -> list[list[int]]:
    async with AsyncClient(endpoint) as client:
        completions = await asyncio.gather(*(client.generate(prompt, params) for prompt in work))
    return [completion.token_ids for completion in completions]


def free_blocks(status: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {
        s["name"]: (s["kv_blocks"]["free"], s["kv_blocks"]["total"]) for s in status["services"] if s.get("kv_blocks")
    }


async def settled_status(endpoint: str) -> dict[str, Any]:
    """The status once nothing is live and every block is back (asserted by the test's timeout)."""
    async with AsyncClient(endpoint) as client:
        while True:
            status = await client.status()
            if status["live"]["requests"] == 0 and all(f == t for f, t in free_blocks(status).values()):
                return status


LAYOUTS = [
    ("--prompt-stages", "1", "--token-stages", "1"),
    ("--prompt-stages", "2", "--token-stages", "3"),
    ("--prompt-stages", "3", "--token-stages", "2"),
    ("--prompt-stages", "1", "--token-stages", "2", "--link", "zmq"),
    ("--prompt-pipelines", "2", "--token-pipelines", "2"),
    ("--colocated", "--token-stages", "1"),
    ("--colocated", "--token-stages", "2"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
async def test_greedy_tokens_equal_transformers(layout: tuple[str, ...]) -> None:
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 130, 200, 257, 300]
    work = prompts(7, lengths)
    with running(*FLOAT32, "--chunk-size", "64", *layout) as system:
        tokens = await generate_all(system.endpoint, work, GREEDY)
        await settled_status(system.endpoint)
    for prompt, token_ids in zip(work, tokens, strict=True):
        assert len(token_ids) == GREEDY.max_tokens
        assert_greedy(TINY, prompt, token_ids)


async def test_one_system_many_wishes() -> None:
    """Everything that needs no layout of its own, on one running system."""
    with running(*FLOAT32, "--prompt-stages", "2", "--token-stages", "2") as system:
        await check_refusals(system)
        await check_seeds_hold_alone_and_in_a_batch(system)
        await check_ends(system)
        await check_text(system)
        await check_cancels_leak_nothing(system)
        check_command_line(system)
        check_sync_client(system)


async def check_refusals(system: System) -> None:
    async with AsyncClient(system.endpoint) as client:
        with pytest.raises(PromptEmpty):
            await client.generate([], GREEDY)
        with pytest.raises(TokenOutOfRange):
            await client.generate([1, 1 << 20], GREEDY)
        with pytest.raises(PromptTooLong):
            await client.generate([5] * 5000, GREEDY)
        with pytest.raises(PromptTooLong):
            await client.generate([5] * 10, SamplingParams(max_tokens=4096))
        with pytest.raises(InvalidParameter, match="stop_token_ids"):
            await client.generate([5], SamplingParams(stop_token_ids=[1 << 20]))


async def check_seeds_hold_alone_and_in_a_batch(system: System) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, seed=11, max_tokens=16, n=2, ignore_eos=True)
    work = prompts(3, [20, 40, 9])
    async with AsyncClient(system.endpoint) as client:
        alone = [await client.generate(prompt, params) for prompt in work]
        together = await asyncio.gather(*(client.generate(prompt, params) for prompt in work * 2))
    for completion, expected in zip(together, alone * 2, strict=True):
        assert [c.token_ids for c in completion.choices] == [c.token_ids for c in expected.choices]
    assert alone[0].choices[0].token_ids != alone[0].choices[1].token_ids


async def check_ends(system: System) -> None:
    prompt = prompts(5, [30])[0]
    async with AsyncClient(system.endpoint) as client:
        tokens = (await client.generate(prompt, GREEDY)).token_ids
        one = await client.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        assert (one.token_ids, one.finish_reason) == (tokens[:1], "length")
        stop = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[tokens[0]])
        first = await client.generate(prompt, stop)
        assert (first.token_ids, first.finish_reason, first.text) == (tokens[:1], "stop", "")


async def check_text(system: System) -> None:
    async with AsyncClient(system.endpoint) as client:
        plain = await client.generate("It was a quiet morning in 🌍 and", GREEDY)
        assert plain.text
        cut = plain.text[len(plain.text) // 2 :][:3]
        stopped = await client.generate(
            "It was a quiet morning in 🌍 and", SamplingParams(temperature=0.0, max_tokens=24, stop=[cut])
        )
        assert stopped.text == plain.text[: plain.text.index(cut)]
        assert stopped.finish_reason == "stop"
        streamed = [t async for t in client.stream("Once", GREEDY)]
        assert "".join(t.text for t in streamed) == (await client.generate("Once", GREEDY)).text


async def check_cancels_leak_nothing(system: System) -> None:
    draws = random.Random(1)
    work = prompts(9, [draws.randrange(1, 200) for _ in range(150)])

    async def one(client: AsyncClient, prompt: list[int], keep: int) -> None:
        stream = client.stream(prompt, GREEDY)
        async for token in stream:
            if token.index >= keep:
                break
        await stream.aclose()

    async with AsyncClient(system.endpoint) as client, asyncio.TaskGroup() as tasks:
        for prompt in work:
            tasks.create_task(one(client, prompt, draws.randrange(0, 40)))
    await settled_status(system.endpoint)


def check_command_line(system: System) -> None:
    environment = os.environ | {"DEJAVU_ENDPOINT": system.endpoint}
    command = [sys.executable, "-m", "dejavu"]
    done = subprocess.run(
        [*command, "generate", "Once upon a time", "--max-tokens", "8", "--temperature", "0"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    bad = subprocess.run(
        [*command, "generate", "x", "--temperature", "nan"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert bad.returncode != 0 and "temperature" in bad.stderr
    status = subprocess.run(
        [*command, "status", "--json"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    roles = {service["role"] for service in json.loads(status.stdout)["services"]}
    assert {"router", "prompt_stage", "token_stage"} <= roles


def check_sync_client(system: System) -> None:
    with Client(system.endpoint) as client:
        assert client.generate([5, 6, 7], GREEDY).finish_reason == "length"
        assert len(list(client.stream([5, 6, 7], GREEDY))) == GREEDY.max_tokens


async def test_blocks_run_out_and_everything_still_ends() -> None:
    """A pool that holds a few sequences: the rest queue or are preempted; tokens stay exact."""
    work = prompts(13, [60] * 12)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for layout in (("--token-stages", "2"), ("--colocated",)):
        with running("--dtype", "float32", "--kv-memory", "900K", *layout) as system:
            tokens = await generate_all(system.endpoint, work, params)
            await settled_status(system.endpoint)
        for prompt, token_ids in zip(work, tokens, strict=True):
            assert len(token_ids) == 60
            assert_greedy(TINY, prompt, token_ids)


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    with running(*FLOAT32) as system:
        below = descendants(system.process.pid)
        assert len(below) >= 4
        assert system.stop(signal.SIGINT) == 0
    assert not [pid for pid in below if Path("/proc", str(pid)).exists()]
    left = {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("__KMP")}
    assert not left


async def test_a_killed_client_frees_its_blocks() -> None:
    program = (
        "import sys\nfrom dejavu import Client, SamplingParams\n"
        "client = Client(sys.argv[1]).__enter__()\n"
        "for token in client.stream([5] * 50, SamplingParams(max_tokens=3000, ignore_eos=True)):\n"
        "    print(token.index, flush=True)\n"
    )
    with running(*FLOAT32) as system:
        process = subprocess.Popen(
            [sys.executable, "-c", program, system.endpoint], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "0"
        process.kill()
        process.wait()
        process.stdout.close()
        await settled_status(system.endpoint)
