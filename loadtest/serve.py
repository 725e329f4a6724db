"""Throughput and latency of layouts, side by side: `python -m loadtest.serve --json FILE`.

Starts `dejavu serve` once per layout, runs the same workload against each, and writes one JSON document with every
run, the machine and the versions. With `--baseline` it also measures transformers' static-batch `generate` on the same
cores, or the same GPU, in the same run. Examples:

    python -m loadtest.serve --json out.json --model DIR --workload decode-heavy --baseline
    python -m loadtest.serve --json out.json --layout disaggregated --rate 1.5 --workload lmsys-like
    python -m loadtest.serve --json out.json --workload my-trace.json --arrivals trace
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dejavu import AsyncClient, SamplingParams
from loadtest.baseline import measure_baseline
from loadtest.drive import drive, summarise
from loadtest.machine import describe_machine
from loadtest.system import running_system
from loadtest.workload import NAMED, Workload, all_at_once, load_workload, with_poisson_arrivals

LAYOUTS = {"disaggregated": [], "colocated": ["--colocated"]}
SALT_STEP = 97


def main() -> int:
    """Runs the benchmark; exit code 0 where no request failed."""
    arguments = _parser().parse_args()
    vocab_size = int(json.loads(Path(arguments.model, "config.json").read_text())["vocab_size"])
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
        options += arguments.serve_options.split()
        results["layouts"][layout] = asyncio.run(_measure(options, workload, arguments.repetitions, vocab_size, layout))
        results["layouts"][layout]["serve_options"] = options
    Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    if arguments.baseline:
        device = device_of(arguments.serve_options.split())
        results["baseline"] = measure_baseline(arguments.model, arguments.dtype, device, workload, vocab_size)
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {arguments.json}", flush=True)
    runs = [run for layout in results["layouts"].values() for run in layout["runs"]]
    return 1 if any(run["num_failed"] for run in runs) else 0


def device_of(options: Sequence[str]) -> str:
    """What `dejavu serve` is told by these options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    return str(parser.parse_known_args(options)[0].device)


async def _measure(
    options: list[str], workload: Workload, repetitions: int, vocab_size: int, label: str
) -> dict[str, Any]:
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    runs = []
    async with running_system(options) as endpoint, AsyncClient(endpoint) as client:
        warm_up = Workload("warm-up", all_at_once(workload).items[:4])
        await drive(client, warm_up.rotated(1, vocab_size), params)
        for repetition in range(repetitions):
            fresh = workload.rotated((repetition + 1) * SALT_STEP, vocab_size)
            figures = summarise(*await drive(client, fresh, params))
            runs.append(figures)
            print(f"{label} run {repetition}: {_line(figures)}", flush=True)
        status = await client.status()
    loops = {s["name"]: s["loop"] for s in status["services"] if s.get("loop")}
    return {"runs": runs, "event_loops": loops}


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
    parser = argparse.ArgumentParser(
        "loadtest.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, metavar="FILE", help="where the figures go")
    parser.add_argument("--model", default="models/tiny", metavar="DIR")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--workload", default="decode-heavy", help=f"{', '.join(NAMED)}, or a JSON file")
    parser.add_argument("--limit", type=int, help="only the first N requests of a file")
    parser.add_argument("--arrivals", default="burst", choices=["burst", "trace"], help="burst: all at once")
    parser.add_argument("--rate", type=float, help="Poisson arrivals, requests per second")
    parser.add_argument("--layout", action="append", choices=list(LAYOUTS), help="default: all, one after another")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--serve-options", default="", help="more options for `dejavu serve`, in one string")
    parser.add_argument("--baseline", action="store_true", help="measure transformers' generate too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
