"""What a failure costs: `python -m loadtest.recovery --json FILE`.

All requests are sent at once; when a share of all tokens has been delivered, a token stage is killed (SIGKILL). The
same is done with KV replicas and a warm standby, with replicas and a respawned process, with everything recomputed
(`--recovery replay`), and as systems without replication do it: everything is started again and the clients send
what had not finished once more. The cumulative latency (the sum over all requests, each from its first submission to
its last token) is compared with a run without a failure, as the paper does (its figure: 1.24x against 1.91x).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dejavu import AsyncClient, SamplingParams
from loadtest.machine import describe_machine
from loadtest.system import running_system

STAGES = ("--token-stages", "2")
MODES: dict[str, tuple[str, ...]] = {
    "no failure": (*STAGES, "--standbys", "1"),
    "standby": (*STAGES, "--standbys", "1"),
    "respawn": STAGES,
    "replay": (*STAGES, "--standbys", "1", "--recovery", "replay"),
    "restart everything": STAGES,
}


@dataclass(slots=True)
class Request:
    """One request and the times of its tokens; a restarted one begins again."""

    prompt: list[int]
    params: SamplingParams
    sent_at_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    is_finished: bool = False

    @property
    def latency_s(self) -> float:
        return self.token_times_s[-1] - self.sent_at_s

    @property
    def longest_gap_s(self) -> float:
        times = self.token_times_s
        return max((b - a for a, b in zip(times, times[1:], strict=False)), default=0.0)


def main() -> int:
    """Runs all modes in turn; exit code 0 where all delivered the same tokens."""
    arguments = _parser().parse_args()
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    expected: list[list[int]] | None = None
    num_wrong = 0
    for repetition in range(arguments.repetitions):
        for mode in MODES:
            requests, fault_at_s = asyncio.run(_run(mode, arguments, repetition))
            tokens = [request.token_ids for request in requests]
            expected = expected or tokens
            num_wrong += sum(one != other for one, other in zip(tokens, expected, strict=True))
            runs[mode].append(_figures(requests, fault_at_s))
            print(f"{mode}: {runs[mode][-1]}", flush=True)
            _write(arguments, runs, num_wrong)
    return 1 if num_wrong else 0


async def _run(mode: str, arguments: argparse.Namespace, repetition: int) -> tuple[list[Request], float | None]:
    requests = _requests(arguments)
    options = ["--model", arguments.model, "--dtype", arguments.dtype, *MODES[mode]]
    num_tokens = int(arguments.at * arguments.streams * arguments.tokens)
    async with running_system(options) as endpoint, AsyncClient(endpoint) as client:
        await client.generate(requests[0].prompt, SamplingParams(max_tokens=8, temperature=0.0))
        streams = [asyncio.create_task(_follow(client, request)) for request in requests]
        if mode == "no failure":
            await asyncio.gather(*streams)
            return requests, None
        status = await client.status()
        while sum(len(request.token_ids) for request in requests) < num_tokens:
            await asyncio.sleep(0.002)
        fault_at_s = time.monotonic()
        if mode != "restart everything":
            os.kill(_victim(status, random.Random(repetition)), signal.SIGKILL)
            await asyncio.gather(*streams)
            return requests, fault_at_s
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        _kill_everything(status)
    async with _again(options) as client:
        unfinished = [request for request in requests if not request.is_finished]
        for request in unfinished:
            request.token_ids.clear()
        await asyncio.gather(*(_follow(client, request, is_again=True) for request in unfinished))
    return requests, fault_at_s


@contextlib.asynccontextmanager
async def _again(options: list[str]) -> AsyncIterator[AsyncClient]:
    async with running_system(options) as endpoint, AsyncClient(endpoint) as client:
        yield client


async def _follow(client: AsyncClient, request: Request, *, is_again: bool = False) -> None:
    if not is_again:
        request.sent_at_s = time.monotonic()
    async for token in client.stream(request.prompt, request.params):
        request.token_times_s.append(time.monotonic())
        request.token_ids.append(token.id)
    request.is_finished = True


def _requests(arguments: argparse.Namespace) -> list[Request]:
    draws = random.Random(arguments.seed)
    params = SamplingParams(max_tokens=arguments.tokens, temperature=0.0, ignore_eos=True)
    lengths = [draws.randrange(arguments.prompt // 2, 3 * arguments.prompt // 2) for _ in range(arguments.streams)]
    return [Request([draws.randrange(3, 1000) for _ in range(length)], params) for length in lengths]


def _victim(status: dict[str, Any], draws: random.Random) -> int:
    stages = [s for s in status["services"] if s["role"] == "token_stage" and s["state"] == "active"]
    return int(draws.choice(stages)["pid"])


def _kill_everything(status: dict[str, Any]) -> None:
    """The parent of all services; they die with it."""
    pid = status["services"][0]["pid"]
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    for service in status["services"]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(service["pid"], signal.SIGKILL)


def _figures(requests: list[Request], fault_at_s: float | None) -> dict[str, Any]:
    first_s = min(request.sent_at_s for request in requests)
    last_s = max(request.token_times_s[-1] for request in requests)
    return {
        "cumulative_latency_s": round(sum(request.latency_s for request in requests), 3),
        "makespan_s": round(last_s - first_s, 3),
        "longest_gap_s": round(max(request.longest_gap_s for request in requests), 3),
        "fault_after_s": None if fault_at_s is None else round(fault_at_s - first_s, 3),
    }


def _write(arguments: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], num_wrong: int) -> None:
    medians = {mode: statistics.median(run["cumulative_latency_s"] for run in of) for mode, of in runs.items() if of}
    base = medians["no failure"]
    document = {
        "machine": describe_machine(),
        "model": Path(arguments.model).name,
        "workload": {name: getattr(arguments, name) for name in ("streams", "prompt", "tokens", "at", "seed", "dtype")},
        "streams_with_other_tokens": num_wrong,
        "cumulative_latency_ratio": {mode: round(median / base, 3) for mode, median in medians.items()},
        "runs": runs,
    }
    Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "loadtest.recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, metavar="FILE", help="where the figures go")
    parser.add_argument("--model", default="models/tiny", metavar="DIR")
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--streams", type=int, default=16, help="requests, all at once")
    parser.add_argument("--prompt", type=int, default=300, help="mean tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of each stream")
    parser.add_argument("--at", type=float, default=0.7, help="share of all tokens after which the stage is killed")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    return parser


if __name__ == "__main__":
    sys.exit(main())
