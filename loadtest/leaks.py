"""Does anything leak? Many requests, cancelled at random, from clients that are killed at random; afterwards every pool
must have the free blocks that it began with.

    python -m loadtest.leaks [--requests 1000] [--json FILE] [-- --token-stages 2]

Each client is a process of its own with up to 50 requests in flight. A third of them leave in order, a third close
their connection while requests run, a third are killed with SIGKILL.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from typing import Any

from dejavu import AsyncClient, SamplingParams
from deploy.running import running_system
from loadtest.figures import event_loops, save
from loadtest.machine import cpu_clock_jumps_ms, describe_machine
from loadtest.options import add_json, add_seed, add_serve_options, new_parser

REQUESTS_PER_CLIENT = 50
NUM_CLIENTS_AT_ONCE = 3
MAX_PROMPT_TOKENS = 200
MAX_TOKENS = 60
SETTLE_LIMIT_S = 60.0
CLOCK_TEST_S = 20.0
LEAVES = ("in order", "closing", "killed")


class Leaked(Exception):
    """Something is still held though nobody wants it; the message names it."""


def main() -> int:
    """Runs it; exit code 1 where something leaked."""
    arguments = _parser().parse_args()
    if arguments.client is not None:
        asyncio.run(_be_client(arguments.endpoint, arguments.client, arguments.seed, arguments.requests))
        return 0
    try:
        figures = asyncio.run(_with_system(arguments.requests, arguments.seed, arguments.serve_options))
    except Leaked as error:
        print(f"LEAK: {error}")
        return 1
    print(json.dumps(figures, indent=1))
    if arguments.json:
        figures["cpu_clock_jumps_ms"] = cpu_clock_jumps_ms(CLOCK_TEST_S)
        save(arguments.json, {"machine": describe_machine(), **figures})
    return 0


async def _with_system(num_requests: int, seed: int, options: list[str]) -> dict[str, Any]:
    async with running_system(options) as endpoint:
        return await hunt(endpoint, num_requests, seed)


async def hunt(endpoint: str, num_requests: int, seed: int) -> dict[str, Any]:
    """Sends the requests to a running, idle system. Raises `Leaked`."""
    started_s = time.monotonic()
    async with AsyncClient(endpoint) as client:
        before = free_blocks(await _settled(client))
        slots = asyncio.Semaphore(NUM_CLIENTS_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            for index, first in enumerate(range(0, num_requests, REQUESTS_PER_CLIENT)):
                count = min(REQUESTS_PER_CLIENT, num_requests - first)
                tasks.create_task(_run_client(slots, endpoint, LEAVES[index % len(LEAVES)], seed + index, count))
        status = await _settled(client)
        if free_blocks(status) != before:
            raise Leaked(f"free blocks were {before}, are {free_blocks(status)}")
    return {
        "num_requests": num_requests,
        "wall_s": round(time.monotonic() - started_s, 1),
        "free_blocks": before,
        "event_loops": event_loops(status),
    }


def free_blocks(status: dict[str, Any]) -> dict[str, int]:
    """Free blocks of every pool, by the service's name."""
    return {s["name"]: s["kv_blocks"]["free"] for s in status["services"] if s.get("kv_blocks")}


async def _settled(client: AsyncClient) -> dict[str, Any]:
    """The status once nothing is live and every block is free. Raises `Leaked` when that does not come."""
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while True:
        status = await client.status()
        free, live = free_blocks(status), status["live"]
        total = {s["name"]: s["kv_blocks"]["total"] for s in status["services"] if s.get("kv_blocks")}
        if free == total and not any(live.values()):
            return status
        if time.monotonic() > deadline:
            raise Leaked(f"{free} blocks are free of {total}; live: {live}")
        await asyncio.sleep(0.1)


async def _run_client(slots: asyncio.Semaphore, endpoint: str, leave: str, seed: int, count: int) -> None:
    """A client process; one that is to be killed dies after a random number of its requests' first tokens."""
    async with slots:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loadtest.leaks", "--endpoint", endpoint, "--client", leave, "--seed", str(seed),
            "--requests", str(count), stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        if leave == "killed":
            for _ in range(random.Random(seed).randrange(1, count)):
                await process.stdout.readline()
            process.kill()
        await process.stdout.read()
        code = await process.wait()
        if leave != "killed" and code != 0:
            raise Leaked(f"a client that left {leave} ended with {code}")


async def _be_client(endpoint: str, leave: str, seed: int, count: int) -> None:
    draws = random.Random(seed)
    work = [
        (
            [draws.randrange(300, 4000) for _ in range(draws.randrange(1, MAX_PROMPT_TOKENS))],
            draws.choice((0, 1, draws.randrange(MAX_TOKENS), MAX_TOKENS)),
        )
        for _ in range(count)
    ]
    client = AsyncClient(endpoint)
    async with client:
        running = [asyncio.ensure_future(_one(client, prompt, keep)) for prompt, keep in work]
        num_wanted = count if leave != "closing" else count // 2
        for ending in asyncio.as_completed(running):
            await ending
            num_wanted -= 1
            if num_wanted <= 0:
                break
    # left with requests under way: each of them ends with an error of its own
    await asyncio.gather(*running, return_exceptions=True)


async def _one(client: AsyncClient, prompt: list[int], keep: int) -> None:
    """A request that is cancelled once `keep` tokens are there; with MAX_TOKENS it runs to its end."""
    stream = client.stream(prompt, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, seed=1))
    async for token in stream:
        if token.index == 0:
            print("first", flush=True)
        if token.index >= keep:
            break
    await stream.aclose()


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("leaks", __doc__)
    add_json(parser, required=False)
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="in all")
    add_seed(parser, "of prompts, and of when each is left")
    add_serve_options(parser)
    parser.add_argument("--endpoint", default="", help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=LEAVES, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
