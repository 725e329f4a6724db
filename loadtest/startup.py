"""How long `dejavu serve` needs until it is ready, and until it is so again after a stage was killed.

    python -m loadtest.startup --json FILE [--runs 3]

Every layout with and without the nursery, alternating, so that a change of the machine's load meets both. `ready_s` is
from the start of the command to its line on stdout; `again_s` from SIGKILL of token stage 0 to the first token of a
request that is sent at that moment.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from dejavu import AsyncClient, SamplingParams
from deploy.running import running_system
from loadtest.figures import save
from loadtest.machine import describe_machine
from loadtest.options import add_json, add_model, add_runs, new_parser

PROMPT = "It was a fine morning"
VICTIM = "token-0-stage-0"
LAYOUTS = {
    "1+1 stages": ("--prompt-stages", "1", "--token-stages", "1"),
    "2+2 stages": ("--prompt-stages", "2", "--token-stages", "2"),
    "3+3 stages": ("--prompt-stages", "3", "--token-stages", "3"),
}
NURSERIES = ("--nursery", "--no-nursery")


def main() -> int:
    """Measures, prints, writes the JSON file."""
    parser = new_parser("startup", __doc__)
    add_json(parser)
    add_model(parser)
    add_runs(parser, 3, "starts of each layout, with and without the nursery")
    arguments = parser.parse_args()
    runs = asyncio.run(_measure_all(["--model", arguments.model, "--dtype", arguments.dtype], arguments.runs))
    save(arguments.json, {"machine": describe_machine(), "runs": runs})
    return 0


async def _measure_all(model: Sequence[str], num_runs: int) -> list[dict[str, Any]]:
    runs = []
    for _ in range(num_runs):
        for layout, options in LAYOUTS.items():
            for nursery in NURSERIES:
                figures = await _measure([*model, nursery, *options])
                runs.append({"layout": layout, "nursery": nursery == "--nursery", **figures})
                print(runs[-1], flush=True)
    return runs


async def _measure(options: Sequence[str]) -> dict[str, Any]:
    started_s = time.monotonic()
    async with running_system(options) as endpoint, AsyncClient(endpoint) as client:
        ready_s = time.monotonic() - started_s
        status = await client.status()
        os.kill(next(s["pid"] for s in status["services"] if s["name"] == VICTIM), signal.SIGKILL)
        killed_s = time.monotonic()
        await client.generate(PROMPT, SamplingParams(max_tokens=1))
        again_s = time.monotonic() - killed_s
    return {"ready_s": round(ready_s, 2), "again_s": round(again_s, 2)}


if __name__ == "__main__":
    sys.exit(main())
