"""`python -m loadtest.soak --json FILE --minutes M`: nothing fails while everything is busy, and nobody may say it did.

Clients keep a fixed number of requests under way while other processes take whatever the cores have left. Every answer
must be the one that an idle system gave; no service may be suspected or taken for dead; afterwards every KV block must
be back and no service may have grown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dejavu import AsyncClient
from deploy.running import running_system
from loadtest.drive import percentile
from loadtest.figures import event_loops, save
from loadtest.history import ETCD, Stream, check_stream, leaks
from loadtest.machine import describe_machine
from loadtest.options import add_json, add_seed, new_parser
from loadtest.streams import Work, expecting, follow, make_work, quiet, run_undisturbed

SYSTEM = (
    *("--prompt-stages", "2", "--token-stages", "2", "--standbys", "1", "--cache-stores", "2", "--routers", "2"),
    *("--dtype", "float32"),
)
NUM_PROMPTS = 16
NUM_TOKENS = 200
WARM_SHARE = 0.25
"""of the time, after which no service should need more than it has"""
MAX_GROWTH_BYTES = 64 << 20
MAX_MORE_FILES = 16
MIN_BUSY = 0.95

Status = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where nothing was wrong, else 1."""
    options = _parser().parse_args(argv)
    document = {"machine": describe_machine(), "system": SYSTEM, **asyncio.run(_soak(options))}
    save(options.json, document)
    print(json.dumps({name: document[name] for name in ("num_requests", "cpu_busy", "wrong")}))
    return 1 if document["wrong"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("soak", __doc__)
    add_json(parser)
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="of load")
    parser.add_argument("--streams", type=int, default=32, metavar="N", help="under way at any time")
    burners = "processes that only burn time; by default one a core"
    parser.add_argument("--burners", type=int, default=os.cpu_count(), metavar="N", help=burners)
    add_seed(parser, "of the prompts and their order")
    return parser


async def _soak(options: argparse.Namespace) -> dict[str, Any]:
    work = make_work(options.seed, NUM_PROMPTS, NUM_TOKENS)
    async with running_system(SYSTEM) as endpoint, AsyncClient(endpoint) as client:
        truth = await run_undisturbed(client, work)
        before = await quiet(client)
        async with _burning(options.burners):
            started_s, busy_before = time.monotonic(), _cpu_times()
            end_s = started_s + 60 * options.minutes
            warm = asyncio.create_task(_sizes_at(before, started_s + WARM_SHARE * 60 * options.minutes))
            streams = await _load(client, options, work, truth, end_s)
            cpu_busy, wall_s = _busy_share(busy_before, _cpu_times()), time.monotonic() - started_s
        after = await quiet(client)
        sizes = await warm, _sizes(before)
    wrong = [*_wrong_streams(streams), *_wrong_status(before, after, started_s), *_grown(*sizes)]
    if cpu_busy < MIN_BUSY:
        wrong.append(f"the cores were busy for {cpu_busy:.0%} of the time only")
    return {
        "wall_s": round(wall_s, 1),
        "cpu_busy": round(cpu_busy, 4),
        "num_burners": options.burners,
        "num_streams": options.streams,
        "num_requests": len(streams),
        **_figures(streams, wall_s),
        "event_loops": event_loops(after),
        "sizes": {name: [sizes[0].get(name), size] for name, size in sizes[1].items()},
        "counters": {name: count - before["counters"].get(name, 0) for name, count in after["counters"].items()},
        "wrong": wrong,
    }


# ------------------------------------------------------------ load


@contextlib.asynccontextmanager
async def _burning(num: int) -> AsyncIterator[None]:
    command = (sys.executable, "-c", "while True: pass")
    burners = [await asyncio.create_subprocess_exec(*command) for _ in range(num)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            await burner.wait()


async def _load(
    client: AsyncClient, options: argparse.Namespace, work: Work, truth: Sequence[Stream], end_s: float
) -> list[Stream]:
    """So many at a time until the end; then those under way are waited for."""
    streams: list[Stream] = []

    async def keep_asking(number: int) -> None:
        draws = random.Random(f"{options.seed}/{number}")
        while time.monotonic() < end_s:
            index = draws.randrange(len(work))
            [stream] = expecting([truth[index]])
            streams.append(stream)
            await follow(client, stream, *work[index])

    await asyncio.gather(*(keep_asking(number) for number in range(options.streams)))
    return streams


def _figures(streams: Sequence[Stream], wall_s: float) -> dict[str, Any]:
    num_tokens = sum(len(stream.tokens) for stream in streams)
    gaps = [b[0] - a[0] for s in streams for a, b in zip(s.tokens, s.tokens[1:], strict=False)]
    named = {f"gap_p{percent:g}_s": percentile(gaps, percent) for percent in (50, 99, 99.9, 100)}
    return {"tokens_per_s": round(num_tokens / wall_s, 1), **{n: v and round(v, 4) for n, v in named.items()}}


# ------------------------------------------------------------ what must not be


def _wrong_streams(streams: Sequence[Stream]) -> list[str]:
    return [str(anomaly) for stream in streams for anomaly in check_stream(stream)]


def _wrong_status(before: Status, after: Status, since_s: float) -> list[str]:
    """Nobody died, so nobody may have been suspected or replaced; nothing is live, so nothing may be held."""
    wrong = [
        f"false fail-over: {event}"
        for event in after["events"]
        if event["kind"] in ("suspected", "detected", "decided", "leader")
        and event["at_monotonic_s"] >= since_s
        and event["service"] != ETCD
    ]
    if after["counters"]["false_failovers"] or after["epoch"] != before["epoch"]:
        wrong.append(f"epoch {before['epoch']} became {after['epoch']}: {after['counters']}")
    return wrong + [str(anomaly) for anomaly in leaks(after)]


def _grown(warm: Mapping[str, dict[str, int]], last: Mapping[str, dict[str, int]]) -> list[str]:
    return [
        f"{name} has grown from {warm[name]} to {size}"
        for name, size in last.items()
        if name in warm
        and (
            size["memory_bytes"] - warm[name]["memory_bytes"] > MAX_GROWTH_BYTES
            or size["files"] - warm[name]["files"] > MAX_MORE_FILES
        )
    ]


# ------------------------------------------------------------ the operating system's view


async def _sizes_at(status: Status, at_s: float) -> dict[str, dict[str, int]]:
    await asyncio.sleep(max(0.0, at_s - time.monotonic()))
    return _sizes(status)


def _sizes(status: Status) -> dict[str, dict[str, int]]:
    """Private memory and open files of every service that still lives."""
    return {
        s["name"]: _size(Path(f"/proc/{s['pid']}")) for s in status["services"] if Path(f"/proc/{s['pid']}").exists()
    }


def _size(process: Path) -> dict[str, int]:
    fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return {"memory_bytes": int(fields["RssAnon"].split()[0]) << 10, "files": len(list((process / "fd").iterdir()))}


def _cpu_times() -> tuple[int, int]:
    """(idle, all) of all cores, in ticks."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return ticks[3] + ticks[4], sum(ticks[:8])


def _busy_share(before: tuple[int, int], after: tuple[int, int]) -> float:
    return 1.0 - (after[0] - before[0]) / max(1, after[1] - before[1])


if __name__ == "__main__":
    sys.exit(main())
