"""Throughput and latency of layouts, side by side: `python -m loadtest.serve --json FILE`.

Starts `dejavu serve` once per layout, runs the same workload against each, and writes one JSON document with every
run, the machine and the versions. With `--baseline` it also measures transformers' static-batch `generate` on the same
cores, or the same GPU, in the same run. Examples:

    python -m loadtest.serve --json out.json --model DIR --workload decode-heavy --baseline
    python -m loadtest.serve --json out.json --layout disaggregated --rate 1.5 --workload lmsys-like
    python -m loadtest.serve --json out.json --workload my-trace.json --arrivals trace
    python -m loadtest.serve --json out.json --layout colocated -- --token-stages 2 --cache-stores 0
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dejavu import AsyncClient, SamplingParams
from deploy.running import running_system
from loadtest.baseline import measure_baseline
from loadtest.drive import drive, summarise
from loadtest.figures import event_loops, save
from loadtest.machine import describe_machine
from loadtest.options import add_json, add_model, add_runs, add_serve_options, new_parser
from loadtest.workload import NAMED, Workload, all_at_once, load_workload, vocab_size_of, with_poisson_arrivals

LAYOUTS = {"disaggregated": [], "colocated": ["--colocated"]}
SALT_STEP = 97


def main() -> int:
    """Runs the benchmark; exit code 0 where no request failed."""
    arguments = _parser().parse_args()
    vocab_size = vocab_size_of(arguments.model)
    workload = _workload(arguments, vocab_size)
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "workload": {
            "name": workload.name,
            "num_requests": len(workload.items),
            "prompt_tokens": workload.num_prompt_tokens,
            "output_tokens": workload.num_output_tokens,
            "arrivals": arguments.arrivals,
            "rate_per_s": arguments.rate,
        },
        "layouts": {},
    }
    for layout in arguments.layout or list(LAYOUTS):
        options = ["--model", arguments.model, "--dtype", arguments.dtype, *LAYOUTS[layout]]
        options += arguments.serve_options
        results["layouts"][layout] = asyncio.run(_measure(options, workload, arguments.runs, vocab_size, layout))
        results["layouts"][layout]["serve_options"] = options
    save(arguments.json, results)
    if arguments.baseline:
        device = device_of(arguments.serve_options)
        results["baseline"] = measure_baseline(arguments.model, arguments.dtype, device, workload, vocab_size)
        save(arguments.json, results)
    print(f"written to {arguments.json}", flush=True)
    runs = [run for layout in results["layouts"].values() for run in layout["runs"]]
    return 1 if any(run["num_failed"] for run in runs) else 0


def device_of(options: Sequence[str]) -> str:
    """What `dejavu serve` is told by these options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    return str(parser.parse_known_args(options)[0].device)


async def _measure(
    options: list[str], workload: Workload, num_runs: int, vocab_size: int, label: str
) -> dict[str, Any]:
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    runs = []
    async with running_system(options) as endpoint, AsyncClient(endpoint) as client:
        warm_up = Workload("warm-up", all_at_once(workload).items[:4])
        await drive(client, warm_up.rotated(1, vocab_size), params)
        for number in range(num_runs):
            fresh = workload.rotated((number + 1) * SALT_STEP, vocab_size)
            figures = summarise(*await drive(client, fresh, params))
            runs.append(figures)
            print(f"{label} run {number}: {_line(figures)}", flush=True)
        status = await client.status()
    return {"runs": runs, "event_loops": event_loops(status)}


def _line(figures: dict[str, Any]) -> str:
    names = (
        "output_tokens_per_s",
        "prompt_tokens_per_s",
        "ttft_p50_ms",
        "tpot_p50_ms",
        "gap_p99_ms",
        "num_failed",
    )
    return " ".join(f"{name}={figures[name]}" for name in names)


def _workload(arguments: argparse.Namespace, vocab_size: int) -> Workload:
    if arguments.workload in NAMED:
        workload = NAMED[arguments.workload](vocab_size)
    else:
        workload = load_workload(Path(arguments.workload), arguments.limit)
    if arguments.rate:
        return with_poisson_arrivals(workload, arguments.rate)
    return workload if arguments.arrivals == "trace" else all_at_once(workload)


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("serve", __doc__)
    add_json(parser)
    add_model(parser)
    names = f"{', '.join(NAMED)}, or a JSON file of requests"
    parser.add_argument("--workload", default="decode-heavy", metavar="NAME|FILE", help=names)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N requests of a file")
    arrivals = "burst: all at once; trace: when the file says"
    parser.add_argument("--arrivals", default="burst", choices=["burst", "trace"], help=arrivals)
    parser.add_argument("--rate", type=float, metavar="R", help="Poisson arrivals instead, R requests per second")
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS), help="only this one; may be repeated")
    add_runs(parser, 3, "times that each layout gets the workload")
    parser.add_argument("--baseline", action="store_true", help="measure transformers' generate, too")
    add_serve_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
