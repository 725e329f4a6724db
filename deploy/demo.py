"""`make demo`: starts the system, streams a completion of a real prompt, shows where it ran and what KV moved."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from dejavu import AsyncClient, SamplingParams
from deploy.running import DidNotStart, running_system

PROMPT = "It was a fine morning in the spring, and she had resolved to walk as far as the"
LAYOUT = ("--prompt-stages", "2", "--token-stages", "2")
NUM_TOKENS = 60


def main() -> int:
    """Runs the demonstration; exit code 0 where everything worked."""
    try:
        return asyncio.run(_demo(sys.argv[1:]))
    except DidNotStart:  # its log has said why
        return 1


async def _demo(extra: Sequence[str]) -> int:
    _say("Starting etcd, a router, a cache store, two prompt stages and two token stages (one process each) ...")
    started_s = time.monotonic()
    quiet = {"DEJAVU_LOG_LEVEL": os.environ.get("DEJAVU_LOG_LEVEL", "WARNING")}
    async with running_system([*LAYOUT, *extra], quiet, shows_log=True) as endpoint:
        _say(f"Ready at {endpoint} after {time.monotonic() - started_s:.1f} s. The prompt, and what the model adds:\n")
        async with AsyncClient(endpoint) as client:
            await _stream(client)
            status = await client.status()
    _show_services(status)
    _say("\nEverything has stopped.")
    return 0


async def _stream(client: AsyncClient) -> None:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.7, seed=4, ignore_eos=True)
    sys.stdout.write(f"    {PROMPT}")
    times: list[float] = []
    sent_s = time.monotonic()
    async for token in client.stream(PROMPT, params):
        times.append(time.monotonic() - sent_s)
        sys.stdout.write(token.text)
        sys.stdout.flush()
    rate = (len(times) - 1) / (times[-1] - times[0])
    _say(f"\n\nFirst token after {1e3 * times[0]:.0f} ms, then {rate:.0f} tokens/s.")


def _show_services(status: dict[str, Any]) -> None:
    _say("\nWhere it ran, and what KV cache moved from prompt stages to token stages and to the store:\n")
    _say(f"    {'service':<18} {'pid':>8}  {'layers':<8} {'link':<8} KV cache")
    for service in status["services"]:
        layers = "{}-{}".format(*service["layers"]) if service["layers"] else ""
        handoff = service.get("handoff", {})
        amounts = {
            "sent": handoff.get("sent_bytes"),
            "received and verified": handoff.get("received_bytes"),
            "copied": service.get("replicas", {}).get("received_bytes"),
        }
        moved = ", ".join(f"{what} {amount / 1024:.1f} KiB" for what, amount in amounts.items() if amount)
        _say(f"    {service['name']:<18} {service['pid']:>8}  {layers:<8} {service.get('link') or '':<8} {moved}")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
