"""`python -m loadtest.chaos --json FILE`: real faults under real streams; every history is checked.

For each fault a system is started, its streams are run once without a fault, and then again and again with the fault at
a random moment: by turns while prompts are computed, as one is handed over, and among token steps. The file keeps every
run; another call adds to it. A run takes about 4 s (longer where the fault itself lasts), a start 8 s.

`python -m loadtest.chaos --table FILE` prints the figures of all runs so far, and whether the limits were met.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from dejavu import AsyncClient
from loadtest.chaos_table import summarise, table
from loadtest.doomed_client import doomed_client
from loadtest.faults import DEFAULT_OUTAGE_S, FAULTS, Fault, known_faults
from loadtest.figures import load, save
from loadtest.history import (
    Anomaly,
    History,
    Stream,
    check,
    detected_s,
    most_recomputed_tokens,
    recomputed_tokens,
)
from loadtest.machine import describe_machine
from loadtest.moments import TOO_LATE, Timing, await_moment, moment_of, timing_of
from loadtest.options import add_runs, add_seed, new_parser
from loadtest.partition import NoNamespaces, is_inside, run_inside
from loadtest.streams import Work, cancelled, expecting, follow, make_work, quiet, run_undisturbed, settled
from loadtest.strikes import Scene

NUM_STREAMS = 16
NUM_TOKENS = 300
RUN_LIMIT_S = 120.0
LEAVING_S = 1.0
"""after the strike"""
HEALTHY_LAG_TOKENS = 4
POLL_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where no anomaly was found, else 1."""
    options = _parse(argv)
    if options.table:
        print(table(load(options.table)))  # noqa: T201
        return 0
    file = Path(options.json)
    document = load(file) if file.exists() else {"machine": describe_machine(), "faults": {}}
    for name in options.fault or FAULTS:
        try:
            if FAULTS[name].is_apart and not is_inside():
                save(file, document)
                run_inside(_arguments(name, options))
                document = load(file)
            else:
                asyncio.run(_run_fault(name, options, document, file))
        except NoNamespaces as error:
            _say(f"{name} cannot be done here: {error}")
            return 1
    num_anomalies = sum(len(run["anomalies"]) for fault in document["faults"].values() for run in fault["runs"])
    _say(f"{num_anomalies} anomalies; everything is in {file}")
    return 1 if num_anomalies else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("chaos", __doc__)
    parser.epilog = "faults:\n" + "\n".join(f"  {name:22} {fault.what}" for name, fault in FAULTS.items())
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", metavar="FILE", help="where the runs are kept")
    what.add_argument("--table", metavar="FILE", help="runs nothing: prints what is in it as a table in Markdown")
    known = "only this one of those below; may be repeated"
    parser.add_argument("--fault", action="append", choices=list(FAULTS), metavar="NAME", help=known)
    add_runs(parser, 5, "more runs of each fault")
    add_seed(parser, "of prompts and moments")
    parser.add_argument("--model", default="models/tiny", metavar="DIR", help="Hugging Face checkpoint")
    outage = "for how long an outage of etcd lasts"
    parser.add_argument("--outage-s", type=float, default=DEFAULT_OUTAGE_S, metavar="S", help=outage)
    return parser.parse_args(argv)


def _arguments(name: str, options: argparse.Namespace) -> list[str]:
    """Of another process, for this fault alone."""
    command = ["-m", "loadtest.chaos", "--json", options.json, "--fault", name, "--model", options.model]
    return [*command, "--runs", str(options.runs), "--seed", str(options.seed), "--outage-s", str(options.outage_s)]


async def _run_fault(name: str, options: argparse.Namespace, document: dict[str, Any], file: Path) -> None:
    fault = known_faults(options.outage_s)[name]
    about = document["faults"].setdefault(name, {"runs": []})
    about |= {"what": fault.what, "arguments": fault.arguments, "environment": fault.environment}
    about["limits"] = dataclasses.asdict(fault.limits) | {"recomputed_tokens": fault.max_recomputed_tokens}
    runs = about["runs"]
    arguments = [*fault.arguments, "--model", options.model, "--dtype", "float32"]
    _say(f"{name}: {fault.what}; a system is being started")
    async with fault.system(arguments, fault.environment) as endpoint, AsyncClient(endpoint) as client:
        num_services = len((await client.status())["services"])
        work = make_work(options.seed, NUM_STREAMS, NUM_TOKENS)
        started_s = time.monotonic()
        expected = await run_undisturbed(client, work)
        timing = timing_of(expected, started_s)
        _say(f"{name}: {timing.longest_s:.1f} s without a fault")
        num_wanted = len(runs) + options.runs
        while len(runs) < num_wanted:
            if fault.prepare is not None:
                await fault.prepare(client)
            draws = random.Random(f"{options.seed}/{name}/{len(runs)}")
            # by turns, also over several calls
            aim = "decode" if fault.is_late else ("prefill", "hand-off", "decode")[len(runs) % 3]
            started_s = time.monotonic()
            run = await _run_once(endpoint, client, fault, work, expected, Moment(aim, draws, timing))
            await settled(client, num_services)
            if run["moment"] == TOO_LATE and not run["anomalies"]:
                timing = dataclasses.replace(timing, longest_s=timing.longest_s / 2)
                _say(f"{name}: all streams had ended before the strike; again, and sooner")
                continue
            runs.append(run)
            about["summary"] = summarise(runs, NUM_STREAMS)
            save(file, document)
            _say(f"{name} {len(runs)}: {_line(runs[-1])} ({time.monotonic() - started_s:.1f} s)")


@dataclasses.dataclass(frozen=True, slots=True)
class Moment:
    """When to strike."""

    aim: str
    draws: random.Random
    timing: Timing


async def _run_once(
    endpoint: str, client: AsyncClient, fault: Fault, work: Work, expected: Sequence[Stream], moment: Moment
) -> dict[str, Any]:
    before = await client.status()
    streams = expecting(expected)
    async with doomed_client(endpoint, fault.num_leaving) as leave:
        ending = _all(client, streams, work)
        await await_moment(moment.aim, streams, moment.draws, moment.timing)
        struck_in, fault_at_s = moment_of(streams), time.monotonic()
        async with _watching_copies(client, fault, fault_at_s) as copies:
            scene = Scene(client, before, moment.draws)
            struck = await fault.strike(scene)
            await asyncio.sleep(LEAVING_S * moment.draws.random() * bool(fault.num_leaving))
            await leave()
            await _within_limit(ending)
    while time.monotonic() < fault_at_s + fault.lasts_s:
        more = expecting(expected)
        await _within_limit(_all(client, more, work))
        streams += more
    after = await quiet(client)
    history = History(streams, before, after, struck, fault_at_s, fault.max_recomputed_tokens)
    anomalies = check(history)
    if not fault.shows(before, after):
        anomalies.append(Anomaly("without effect", "", "status does not show the fault"))
    return {
        "struck": struck,
        "moment": struck_in,
        "detected_s": detected_s(after["events"], {name: fault_at_s for name in struck} | scene.struck_at_s),
        "next_token_s": max(stream.longest_gap_s(fault_at_s) for stream in streams),
        "protected_s": None if fault.limits.protected_s is None else max(copies, default=0.0),
        "recomputed_tokens": recomputed_tokens(before, after),
        "most_recomputed_tokens": most_recomputed_tokens(before, after),
        "anomalies": [[anomaly.name, anomaly.where, anomaly.detail] for anomaly in anomalies],
    }


@contextlib.asynccontextmanager
async def _watching_copies(client: AsyncClient, fault: Fault, fault_at_s: float) -> AsyncIterator[list[float]]:
    """When, after the fault, streams last lacked copies of their KV: looked at until the end of the block, and only
    where the fault has a limit for it, for looking takes time."""
    seen_s: list[float] = []

    async def look() -> None:
        while True:
            status = await client.status()
            if status["counters"]["replica_lag_tokens"] > HEALTHY_LAG_TOKENS:
                seen_s.append(time.monotonic() - fault_at_s)
            await asyncio.sleep(POLL_S)

    tasks = [asyncio.create_task(look())] if fault.limits.protected_s is not None else []
    try:
        yield seen_s
    finally:
        await cancelled(tasks)


def _all(client: AsyncClient, streams: Sequence[Stream], work: Work) -> asyncio.Future[list[None]]:
    """Ends when all of them have."""
    return asyncio.gather(*(follow(client, s, *each) for s, each in zip(streams, work, strict=True)))


async def _within_limit(ending: asyncio.Future[list[None]]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RUN_LIMIT_S):
            await ending


def _line(run: dict[str, Any]) -> str:
    detected = "-" if run["detected_s"] is None else f"{run['detected_s']:.3f} s"
    names = ", ".join(sorted({name for name, _, _ in run["anomalies"]})) or "no anomaly"
    return (
        f"{'+'.join(run['struck']) or 'nobody'} in {run['moment']}, detected {detected}, "
        f"next token {run['next_token_s']:.3f} s, {run['recomputed_tokens']} tokens recomputed "
        f"({run['most_recomputed_tokens']} of one stream), {names}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
