"""`python -m loadtest.recovery --json FILE`: what a failure costs the streams, by how the system recovers from it.

All streams begin together on one prompt stage and two token stages. When a share of all tokens has been delivered, a
token stage is killed (kill -9). Compared are ways to go on: from replicas with and without a standby, computing
everything again with one, and what there is without any of it: the whole system is killed, started again, and clients
ask once more.

*Cumulative latency* is the sum over all streams of the time from asking to the last token, here as a ratio to the run
without a failure on the same system just before. The *longest gap* is that of any stream without a token that it had
not seen yet.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dejavu import AsyncClient, SamplingParams
from deploy.running import running_system
from loadtest.figures import load, save
from loadtest.history import Stream, check_stream
from loadtest.machine import describe_machine
from loadtest.options import add_json, add_runs, add_seed, new_parser
from loadtest.streams import Work, cancelled, expecting, follow, make_work, run_undisturbed, settled
from loadtest.strikes import parent_of

LAYOUT = ("--prompt-stages", "1", "--token-stages", "2", "--dtype", "float32")
VICTIM = ("token-0", 1)
"""pipeline and stage"""
POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Way:
    """How a system recovers."""

    what: str
    arguments: tuple[str, ...]
    is_restarted: bool = False


WAYS = {
    "standby": Way("replicas, a standby takes over", ("--standbys", "1")),
    "alone": Way("replicas, the stage is started again", ()),
    "replay": Way("everything is computed again, a standby takes over", ("--standbys", "1", "--recovery", "replay")),
    "restart": Way("everything is started again, clients ask again", ("--cache-stores", "0"), is_restarted=True),
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one run of all streams, in seconds."""

    cumulative_s: float
    total_s: float
    longest_gap_s: float


class Wrong(Exception):
    """A stream did not deliver what it should have; the message says which."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; raises `Wrong` where a stream suffered more than delay. Ways that are in the file already stay there,
    unless they are measured again."""
    options = _parser().parse_args(argv)
    file = Path(options.json)
    document: dict[str, Any] = load(file) if file.exists() else {"ways": {}}
    for name in options.way or WAYS:
        about = {"machine": describe_machine(), **_conditions(options)}
        document["ways"][name] = about | asyncio.run(_measure(WAYS[name], options))
        save(file, document)
        _say(f"{name}: {document['ways'][name]['summary']}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("recovery", __doc__)
    add_json(parser)
    ways = "; ".join(f"{name}: {way.what}" for name, way in WAYS.items())
    parser.add_argument("--way", action="append", choices=list(WAYS), help=f"only this one; may be repeated. {ways}")
    parser.add_argument("--streams", type=int, default=16, metavar="N", help="at once")
    parser.add_argument("--tokens", type=int, default=300, metavar="N", help="of each stream")
    share = "of all tokens, delivered when the stage dies"
    parser.add_argument("--share", type=float, default=0.5, metavar="X", help=share)
    add_runs(parser, 3, "failures for each way")
    add_seed(parser, "of the prompts")
    return parser


def _conditions(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "layout": LAYOUT,
        "num_streams": options.streams,
        "num_tokens": options.tokens,
        "share": options.share,
        "seed": options.seed,
    }


async def _measure(way: Way, options: argparse.Namespace) -> dict[str, Any]:
    work = make_work(options.seed, options.streams, options.tokens)
    num_before = int(options.share * options.streams * options.tokens)
    runs: list[tuple[Outcome, Outcome]] = []
    if way.is_restarted:
        for _ in range(options.runs):
            runs += await _measure_system(way, work, num_before, 1)
    else:
        runs += await _measure_system(way, work, num_before, options.runs)
    return {"what": way.what, "arguments": way.arguments, "runs": [_figures(*run) for run in runs], **_summary(runs)}


async def _measure_system(way: Way, work: Work, num_before: int, num_runs: int) -> list[tuple[Outcome, Outcome]]:
    """Starts one; (without, with) a failure, as often as asked for."""
    arguments = [*LAYOUT, *way.arguments]
    runs = []
    async with running_system(arguments) as endpoint, AsyncClient(endpoint) as client:
        num_services = len((await client.status())["services"])
        await run_undisturbed(client, work)  # the first run of a system is slower
        for _ in range(num_runs):
            asked_at_s = time.monotonic()
            undisturbed = await run_undisturbed(client, work)
            without = _outcome(undisturbed, asked_at_s)
            streams = expecting(undisturbed)
            asked_at_s = time.monotonic()
            if way.is_restarted:
                await _with_failure(client, streams, work, num_before, lambda tasks: _kill_all(client, tasks))
                async with running_system(arguments) as second, AsyncClient(second) as again:
                    await _all_again(again, streams, work)
            else:
                await _with_failure(client, streams, work, num_before, lambda _: _kill_stage(client))
                await settled(client, num_services)
            _check(streams)
            runs.append((without, _outcome(streams, asked_at_s)))
    return runs


async def _with_failure(
    client: AsyncClient,
    streams: list[Stream],
    work: Work,
    num_before: int,
    fail: Callable[[list[asyncio.Task[None]]], Awaitable[None]],
) -> None:
    """Returns when all streams have ended, or `fail(their tasks)` has ended them."""
    tasks = [asyncio.create_task(follow(client, stream, *each)) for stream, each in zip(streams, work, strict=True)]
    while sum(len(stream.tokens) for stream in streams) < num_before:
        await asyncio.sleep(POLL_S)
    await fail(tasks)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _kill_stage(client: AsyncClient) -> None:
    services = (await client.status())["services"]
    victim = next(s for s in services if (s["pipeline"], s["stage_index"]) == VICTIM and s["state"] == "active")
    os.kill(victim["pid"], signal.SIGKILL)


async def _kill_all(client: AsyncClient, tasks: list[asyncio.Task[None]]) -> None:
    """Kills `dejavu serve`, with which everything dies; nobody waits for it."""
    services = (await client.status())["services"]
    os.kill(parent_of(services[0]["pid"]), signal.SIGKILL)
    await cancelled(tasks)


async def _all_again(client: AsyncClient, streams: Sequence[Stream], work: Work) -> None:
    """Those that had not ended begin anew; of what comes only tokens that are new to them are noted."""
    unfinished = [(stream, *each) for stream, each in zip(streams, work, strict=True) if stream.ended != "finished"]
    await asyncio.gather(*(_follow_anew(client, *each) for each in unfinished))


async def _follow_anew(client: AsyncClient, stream: Stream, prompt: list[int], params: SamplingParams) -> None:
    anew = Stream(stream.name, stream.expected)
    await follow(client, anew, prompt, params)
    stream.tokens += anew.tokens[len(stream.tokens) :]
    stream.ended = anew.ended


def _check(streams: Sequence[Stream]) -> None:
    anomalies = [anomaly for stream in streams for anomaly in check_stream(stream)]
    if anomalies:
        raise Wrong(f"{len(anomalies)} anomalies, the first: {anomalies[0]}")


def _outcome(streams: Sequence[Stream], asked_at_s: float) -> Outcome:
    ends = [stream.tokens[-1][0] - asked_at_s for stream in streams]
    return Outcome(sum(ends), max(ends), max(stream.longest_gap_s(asked_at_s) for stream in streams))


def _figures(without: Outcome, failed: Outcome) -> dict[str, float]:
    return {
        "cumulative_without_s": round(without.cumulative_s, 3),
        "cumulative_s": round(failed.cumulative_s, 3),
        "cumulative_ratio": round(failed.cumulative_s / without.cumulative_s, 3),
        "total_without_s": round(without.total_s, 3),
        "total_s": round(failed.total_s, 3),
        "longest_gap_without_s": round(without.longest_gap_s, 3),
        "longest_gap_s": round(failed.longest_gap_s, 3),
    }


def _summary(runs: Sequence[tuple[Outcome, Outcome]]) -> dict[str, dict[str, float]]:
    """Of each figure the median, the ratio that of medians; of ratio and gap also the worst."""
    each = [_figures(*run) for run in runs]
    medians = {name: round(statistics.median(run[name] for run in each), 3) for name in each[0]}
    medians["cumulative_ratio"] = round(medians["cumulative_s"] / medians["cumulative_without_s"], 3)
    worst = {f"{name}_max": max(run[name] for run in each) for name in ("cumulative_ratio", "longest_gap_s")}
    return {"summary": medians | worst}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
