"""How long `dejavu serve` needs until it is ready, and until it is so again after a stage was killed.

    python -m loadtest.startup --json FILE [--repetitions 3]

Every layout with and without the nursery, alternating, so that a change of the machine's load meets both. `ready_s` is
from the start of the command to its line on stdout; `again_s` from SIGKILL of token stage 0 to the first token of a
request that is sent at that moment.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dejavu import AsyncClient, SamplingParams
from loadtest.machine import describe_machine
from loadtest.system import running_system

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
    parser = argparse.ArgumentParser("loadtest.startup", description=__doc__)
    parser.add_argument("--json", required=True, metavar="FILE", help="where the figures go")
    parser.add_argument("--model", default="models/tiny", metavar="DIR")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    runs = asyncio.run(_measure_all(arguments.model, arguments.repetitions))
    Path(arguments.json).write_text(json.dumps({"machine": describe_machine(), "runs": runs}, indent=1))
    return 0


async def _measure_all(model: str, repetitions: int) -> list[dict[str, Any]]:
    runs = []
    for _ in range(repetitions):
        for layout, options in LAYOUTS.items():
            for nursery in NURSERIES:
                figures = await _measure(["--model", model, nursery, *options])
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
