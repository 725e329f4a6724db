"""What each of the paper's optimisations is worth: `python -m loadtest.kv_ladder --json FILE`.

A prompt and some tokens are computed (matrix products stand in for a model) while their KV goes into a pool of
another process, checksums included: 0 naive, one copy per (layer, token, head), after the compute; 1 one buffered
write, after the compute; 2 the prompt layer by layer beside the compute, by a thread; 3 the tokens beside the compute
too: the other process reads them, as a cache store does.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from common.kv.checksum import SpanBinding, span_checksum
from common.kv.geometry import CopyPlan, Range, plan_copies
from common.kv.link import Link, open_link
from common.kv.pool import KvPool
from common.kv.primitives import flush
from common.kv.server import PoolServer
from common.kv.stream import HandoffSpan, HandoffWriter
from loadtest.figures import save
from loadtest.kv_bench import LAYOUT
from loadtest.kv_owner import Owner, owner
from loadtest.machine import describe_machine
from loadtest.options import add_json, add_runs, new_parser

LAYERS = (0, 8)
BLOCKS = range(LAYOUT.num_blocks)
NAMES = {-1: "no streaming", 0: "naive", 1: "buffered", 2: "+ layer by layer", 3: "+ tokens in parallel"}


class Ladder:
    """One run per call of `run`; level -1 streams nothing."""

    def __init__(
        self, source: KvPool, link: Link, writer: HandoffWriter, other: Owner, prompt_tokens: int, num_steps: int
    ) -> None:
        self._source, self._link, self._writer, self._other = source, link, writer, other
        self._prompt = (0, prompt_tokens)
        self._steps = [(token, token + 1) for token in range(prompt_tokens, prompt_tokens + num_steps)]
        self._weights = torch.randn(1024, 1024)
        self._attempt = 0

    async def run(self, level: int) -> float:
        """Seconds from the start of the compute until every byte is there."""
        self._attempt += 1
        started_s = time.perf_counter()
        await self._phase(level, self._prompt, is_beside=level >= 2)
        for step in self._steps:
            await self._phase(level, step, is_beside=level >= 3)
        if level >= 2:
            error = await asyncio.wrap_future(self._writer.drain("ladder", self._attempt))
            if error is not None:
                raise error
        if level >= 3:
            self._other.drain()
        return time.perf_counter() - started_s

    async def _phase(self, level: int, tokens: Range, is_beside: bool) -> None:
        span = HandoffSpan("ladder", self._attempt, "bench", tokens, BLOCKS, BLOCKS, b"")
        values = torch.ones(tokens[1] - tokens[0], 1024)
        for layer in range(*LAYERS):
            for _ in range(4):
                torch.mm(values, self._weights)
            if is_beside and tokens == self._prompt:
                self._writer.submit(span, layer)
        if is_beside and tokens != self._prompt:
            self._other.read([tokens[0]])
        if level >= 0 and not is_beside:
            await self._write(tokens, is_naive=level == 0)

    async def _write(self, tokens: Range, is_naive: bool) -> None:
        plan = plan_copies(LAYOUT, BLOCKS, LAYOUT, BLOCKS, tokens, LAYERS)
        for part in _tiny(plan) if is_naive else [plan]:
            await flush(self._link, self._source, part)
        binding = SpanBinding(LAYOUT.fingerprint, "ladder", LAYERS, tokens, b"")
        span_checksum(self._source.memory, LAYOUT, BLOCKS, binding)


def _tiny(plan: CopyPlan) -> list[CopyPlan]:
    """A copy of its own for every head of every token."""
    size = np.array([LAYOUT.head_bytes])
    return [
        CopyPlan(np.array([start + at]), np.array([to + at]), size)
        for start, to, num_bytes in zip(
            plan.source_offset.tolist(), plan.destination_offset.tolist(), plan.num_bytes.tolist(), strict=True
        )
        for at in range(0, num_bytes, LAYOUT.head_bytes)
    ]


async def measure(other: Owner, num_rounds: int, prompt_tokens: int, num_steps: int) -> list[dict[str, Any]]:
    """Every level once per round; the first round only warms up."""
    source = KvPool.create(LAYOUT, name="writer")
    link = await open_link(other.offer, source)
    server = await PoolServer.start(source, "127.0.0.1", "bench")
    await asyncio.to_thread(other.reads_from, server)
    writer = await HandoffWriter.start(source, lambda arrival: None)
    await writer.connect("bench", [other.offer])
    ladder = Ladder(source, link, writer, other, prompt_tokens, num_steps)
    taken_s: dict[int, list[float]] = {level: [] for level in NAMES}
    for round_number in range(num_rounds + 1):
        for level, times in taken_s.items():
            one_s = await ladder.run(level)
            if round_number:
                times.append(one_s)
    await writer.aclose()
    await link.aclose()
    await server.aclose()
    medians = {level: statistics.median(times) for level, times in taken_s.items()}
    return [
        {
            "level": level,
            "name": NAMES[level],
            "median_ms": round(medians[level] * 1e3, 2),
            "to_no_streaming": round(medians[level] / medians[-1], 3),
            "step_gain": round(medians[level - 1] / medians[level], 3) if level > 0 else None,
            "all_ms": [round(one_s * 1e3, 2) for one_s in times],
        }
        for level, times in taken_s.items()
    ]


def main() -> int:
    """Runs the ladder."""
    parser = new_parser("kv_ladder", __doc__)
    add_json(parser)
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="N", help="of the prompt")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="generated behind it")
    add_runs(parser, 5, "measurements, each of every step")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine()
    load_before = os.getloadavg()
    with owner(LAYOUT) as other:
        levels = asyncio.run(measure(other, arguments.runs, arguments.prompt_tokens, arguments.tokens))
    options = vars(arguments) | {"layers": LAYERS}
    results = {"machine": machine, "load_average": load_before, "options": options, "levels": levels}
    for one in levels:
        print(f"{one['name']:>22} {one['median_ms']:>9} ms  {one['to_no_streaming']} x  step {one['step_gain']}")
    save(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
