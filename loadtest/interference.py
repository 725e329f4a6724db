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
from pathlib import Path
from typing import Any

from dejavu import AsyncClient, SamplingParams
from loadtest.drive import percentile
from loadtest.machine import describe_machine
from loadtest.serve import LAYOUTS
from loadtest.system import running_system


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("loadtest.interference", description=__doc__)
    parser.add_argument("--json", required=True, metavar="FILE")
    parser.add_argument("--model", default="models/tiny", metavar="DIR")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=5, help="long prompts, one after the other")
    parser.add_argument("--quiet-s", type=float, default=10.0, help="seconds measured without long prompts")
    parser.add_argument("--serve-options", default="")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine(), "options": vars(arguments), "layouts": {}}
    for layout, options in LAYOUTS.items():
        chosen = ["--model", arguments.model, "--dtype", arguments.dtype, *options]
        chosen += arguments.serve_options.split()
        figures = asyncio.run(_measure(chosen, arguments))
        results["layouts"][layout] = figures
        print(layout, json.dumps(figures), flush=True)
    Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


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
    vocab_size = int(json.loads(Path(arguments.model, "config.json").read_text())["vocab_size"])
    async with running_system(options) as endpoint, AsyncClient(endpoint) as client:
        streams = Streams(client, vocab_size)
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
