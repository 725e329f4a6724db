"""`python -m loadtest.chaos --json FILE`: real faults under real streams; every history is checked.

For each fault a system is started, its streams are run once without a fault, and then again and again with the fault at
a random moment of prefill, hand-off or decode. The file keeps every run; another call adds to it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dejavu import AsyncClient
from loadtest.faults import DEFAULT_OUTAGE_S, FAULTS, Fault, known_faults
from loadtest.history import Anomaly, History, Stream, check, recomputed_tokens
from loadtest.machine import describe_machine
from loadtest.partition import is_inside, run_inside
from loadtest.streams import Work, expecting, follow, make_work, quiet, run_undisturbed, settled
from loadtest.strikes import Scene

NUM_STREAMS = 16
NUM_TOKENS = 300
RUN_LIMIT_S = 120.0
LATE_S = 1.0
"""after the strike"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where no anomaly was found, else 1."""
    options = _parse(argv)
    file = Path(options.json)
    document = json.loads(file.read_text()) if file.exists() else {"machine": describe_machine(), "faults": {}}
    for name in options.fault or FAULTS:
        if FAULTS[name].is_apart and not is_inside():
            file.write_text(json.dumps(document, indent=1) + "\n")
            run_inside(_arguments(name, options))
            document = json.loads(file.read_text())
        else:
            asyncio.run(_run_fault(name, options, document, file))
    num_anomalies = sum(len(run["anomalies"]) for fault in document["faults"].values() for run in fault["runs"])
    _say(f"{num_anomalies} anomalies; everything is in {file}")
    return 1 if num_anomalies else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "loadtest.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="faults:\n" + "\n".join(f"  {name:20} {fault.what}" for name, fault in FAULTS.items()),
    )
    parser.add_argument("--json", required=True, metavar="FILE", help="where the runs are kept")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only this one; may be repeated")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="runs of each fault (5)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of prompts and moments (0)")
    parser.add_argument("--model", metavar="DIR", help="checkpoint (default: the shipped one)")
    parser.add_argument(
        "--outage-s",
        type=float,
        default=DEFAULT_OUTAGE_S,
        metavar="S",
        help=f"for how long etcd-outage lasts ({DEFAULT_OUTAGE_S:g})",
    )
    return parser.parse_args(argv)


def _arguments(name: str, options: argparse.Namespace) -> list[str]:
    """Of another process, for this fault alone."""
    model = ["--model", options.model] if options.model else []
    command = ["-m", "loadtest.chaos", "--json", options.json, "--fault", name, *model]
    return [*command, "--runs", str(options.runs), "--seed", str(options.seed), "--outage-s", str(options.outage_s)]


async def _run_fault(name: str, options: argparse.Namespace, document: dict[str, Any], file: Path) -> None:
    fault = known_faults(options.outage_s)[name]
    about = {"what": fault.what, "arguments": fault.arguments, "environment": fault.environment}
    runs = document["faults"].setdefault(name, about | {"runs": []})["runs"]
    model = ["--model", options.model] if options.model else []
    arguments = [*fault.arguments, *model, "--dtype", "float32"]
    async with fault.system(arguments, fault.environment) as endpoint, AsyncClient(endpoint) as client:
        num_services = len((await client.status())["services"])
        work = make_work(options.seed, NUM_STREAMS, NUM_TOKENS)
        expected = await run_undisturbed(client, work)
        longest_s = max(stream.tokens[-1][0] for stream in expected) - min(s.tokens[0][0] for s in expected)
        for _ in range(options.runs):
            if fault.prepare is not None:
                await fault.prepare(client)
            draws = random.Random(f"{options.seed}/{name}/{len(runs)}")
            runs.append(await _run_once(client, fault, work, expected, draws, longest_s))
            await settled(client, num_services)
            document["faults"][name]["summary"] = _summary(runs)
            file.write_text(json.dumps(document, indent=1) + "\n")
            _say(f"{name} {len(runs)}: {_line(runs[-1])}")


async def _run_once(
    client: AsyncClient,
    fault: Fault,
    work: Work,
    expected: Sequence[Stream],
    draws: random.Random,
    longest_s: float,
) -> dict[str, Any]:
    before = await client.status()
    streams = expecting(expected)
    ending = _all(client, streams, work)
    await asyncio.sleep(longest_s * draws.uniform(fault.earliest, 0.7))
    fault_at_s = time.monotonic()
    struck = await fault.strike(Scene(client, before, draws))
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
    detected = [e["at_monotonic_s"] for e in after["events"] if e["kind"] == "detected" and e["service"] in struck]
    return {
        "struck": struck,
        "detected_s": min((at_s - fault_at_s for at_s in detected if at_s >= fault_at_s), default=None),
        "next_token_s": max(stream.longest_gap_s(fault_at_s) for stream in streams),
        "recomputed_tokens": recomputed_tokens(before, after),
        "anomalies": [[anomaly.name, anomaly.where, anomaly.detail] for anomaly in anomalies],
    }


def _all(client: AsyncClient, streams: Sequence[Stream], work: Work) -> asyncio.Future[list[None]]:
    """Ends when all of them have."""
    return asyncio.gather(*(follow(client, s, *each) for s, each in zip(streams, work, strict=True)))


async def _within_limit(ending: asyncio.Future[list[None]]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RUN_LIMIT_S):
            await ending


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Percentiles by nearest rank; with few runs p99 is the worst."""
    detected = sorted(run["detected_s"] for run in runs if run["detected_s"] is not None)
    gaps = sorted(run["next_token_s"] for run in runs)
    return {
        "runs": len(runs),
        "anomalies": sum(len(run["anomalies"]) for run in runs),
        "detected_p50_s": _rank(detected, 0.5),
        "detected_p99_s": _rank(detected, 0.99),
        "next_token_p50_s": _rank(gaps, 0.5),
        "next_token_p99_s": _rank(gaps, 0.99),
        "recomputed_per_stream_max": max(run["recomputed_tokens"] for run in runs) / NUM_STREAMS,
    }


def _rank(values: Sequence[float], share: float) -> float | None:
    return round(values[math.ceil(share * len(values)) - 1], 3) if values else None


def _line(run: dict[str, Any]) -> str:
    detected = "-" if run["detected_s"] is None else f"{run['detected_s']:.3f} s"
    names = ", ".join(sorted({name for name, _, _ in run["anomalies"]})) or "no anomaly"
    return (
        f"{'+'.join(run['struck']) or 'nobody'} detected {detected}, next token {run['next_token_s']:.3f} s, "
        f"{run['recomputed_tokens']} tokens recomputed, {names}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
