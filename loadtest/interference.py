"""What a long prompt does to running streams: `python -m loadtest.interference --json FILE`.

Keeps short streams running, lets long prompts arrive one after another, and compares the streams' inter-token gaps with
and without them, in the disaggregated and in the colocated layout.
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
from loadtest.drive import percentile
from loadtest.figures import save
from loadtest.machine import describe_machine
from loadtest.options import add_json, add_model, add_serve_options, new_parser
from loadtest.serve import LAYOUTS
from loadtest.workload import vocab_size_of


def main() -> int:
    """Runs the benchmark."""
    arguments = _parser().parse_args()
    results: dict[str, Any] = {"machine": describe_machine(), "options": vars(arguments), "layouts": {}}
    for layout, options in LAYOUTS.items():
        chosen = ["--model", arguments.model, "--dtype", arguments.dtype, *options]
        chosen += arguments.serve_options
        figures = asyncio.run(_measure(chosen, arguments))
        results["layouts"][layout] = figures
        print(layout, json.dumps(figures), flush=True)
    save(arguments.json, results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("interference", __doc__)
    add_json(parser)
    add_model(parser)
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="short ones, at once")
    parser.add_argument("--prompts", type=int, default=5, metavar="N", help="long ones, one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=2000, metavar="N", help="of each long prompt")
    quiet = "seconds that are measured without long prompts"
    parser.add_argument("--quiet-s", type=float, default=10.0, metavar="S", help=quiet)
    add_serve_options(parser)
    return parser


class Streams:
    """Streams that run until they are stopped; notes every token's time."""

    def __init__(self, client: AsyncClient, vocab_size: int) -> None:
        self.gaps: list[tuple[float, float]] = []
        self._client = client
        self._draws = random.Random(3)
        self._vocab_size = vocab_size
        self._stopping = False
        self.num_started = 0

    def prompt(self, num_tokens: int) -> list[int]:
        return [self._draws.randrange(16, self._vocab_size) for _ in range(num_tokens)]

    def stop(self) -> None:
        self._stopping = True

    async def run(self) -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=512)
        while not self._stopping:
            previous_s: float | None = None
            async for _ in self._client.stream(self.prompt(32), params):
                now_s = time.monotonic()
                if previous_s is None:
                    self.num_started += 1
                else:
                    self.gaps.append((now_s, now_s - previous_s))
                previous_s = now_s
                if self._stopping:
                    break

    def between(self, start_s: float, end_s: float) -> list[float]:
        return [gap for at_s, gap in self.gaps if start_s <= at_s <= end_s]


async def _measure(options: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    async with running_system(options) as endpoint, AsyncClient(endpoint) as client:
        streams = Streams(client, vocab_size_of(arguments.model))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(arguments.streams):
                tasks.create_task(streams.run())
            while streams.num_started < arguments.streams:
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)
            quiet_start_s = time.monotonic()
            await asyncio.sleep(arguments.quiet_s)
            quiet_end_s = time.monotonic()
            ttfts = []
            for _ in range(arguments.prompts):
                sent_s = time.monotonic()
                one = SamplingParams(temperature=0.0, max_tokens=1)
                await client.generate(streams.prompt(arguments.prompt_tokens), one)
                ttfts.append(time.monotonic() - sent_s)
            loaded_end_s = time.monotonic()
            streams.stop()
    quiet = streams.between(quiet_start_s, quiet_end_s)
    loaded = streams.between(quiet_end_s, loaded_end_s)
    figures = {"num_gaps_quiet": len(quiet), "num_gaps_loaded": len(loaded)}
    rows: dict[str, Any] = dict(figures)
    for name, values in (("quiet", quiet), ("loaded", loaded), ("long_prompt_ttft", ttfts)):
        rows[f"{name}_p50_ms"] = round(1e3 * (percentile(values, 50) or 0.0), 2)
        rows[f"{name}_p99_ms"] = round(1e3 * (percentile(values, 99) or 0.0), 2)
    rows["p99_ratio"] = round(rows["loaded_p99_ms"] / rows["quiet_p99_ms"], 3) if quiet else None
    return rows


if __name__ == "__main__":
    sys.exit(main())
