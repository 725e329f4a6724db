"""What streaming costs the compute: `python -m loadtest.kv_overhead --json FILE --model DIR`.

A model prefills prompts and generates tokens in this process, alone, and while all of the new KV goes into the pool of
another process: a prompt is written there layer by layer as it is computed, by a thread of this process; the tokens of
a step are read by the other process, all sequences and layers at once, while the next step is computed. Once with
one compute thread, so that the copy has a core of its own, and once with as many as there are cores, so that it has
none. Time counts until the last byte has arrived.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from common.kv.server import PoolServer
from common.kv.stream import HandoffSpan, HandoffWriter
from loadtest.figures import save
from loadtest.kv_owner import Owner, owner
from loadtest.machine import describe_machine
from loadtest.one_stage import BLOCK_SIZE, OneStage, greedy
from loadtest.options import add_json, add_model, add_runs, new_parser


def main() -> int:
    """Runs the benchmark."""
    arguments = _parser().parse_args()
    stage = OneStage(arguments.model, arguments.dtype, arguments.prompts, arguments.prompt_tokens + arguments.tokens)
    cells: list[dict[str, Any]] = []
    with owner(stage.pool.layout) as other:
        for num_threads in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(num_threads)
            cells.append({"compute_threads": num_threads, **asyncio.run(_measure(stage, other, arguments))})
            print(cells[-1], flush=True)
    document: dict[str, Any] = {
        "machine": describe_machine(),
        "model": Path(arguments.model).name,
        "dtype": stage.spec.dtype,
    }
    document["options"], document["cells"] = vars(arguments), cells
    save(arguments.json, document)
    return 0


async def _measure(stage: OneStage, other: Owner, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every way once per round, so that a disturbance hits both."""
    writer = await HandoffWriter.start(stage.pool, lambda arrival: None)
    await writer.connect("owner", [other.offer])
    server = await PoolServer.start(stage.pool, "127.0.0.1", "overhead")
    await asyncio.to_thread(other.reads_from, server)
    run = _Run(stage, writer, other, arguments)
    times: dict[str, list[float]] = {}
    for round_number in range(arguments.runs + 1):
        for way, is_streaming in (("alone", False), ("streaming", True)):
            for phase, work in (("prefill", run.prefill), ("decode", run.decode)):
                started_s = time.perf_counter()
                await asyncio.to_thread(work, is_streaming)
                if is_streaming:
                    await run.drain(is_prompt=phase == "prefill")
                if round_number:
                    times.setdefault(f"{phase} {way}", []).append(time.perf_counter() - started_s)
    await writer.aclose()
    await server.aclose()
    medians = {name: statistics.median(of) for name, of in times.items()}
    return {
        "median_s": {name: round(one_s, 4) for name, one_s in medians.items()},
        "prefill_overhead": round(medians["prefill streaming"] / medians["prefill alone"] - 1, 4),
        "decode_overhead": round(medians["decode streaming"] / medians["decode alone"] - 1, 4),
        "all_s": {name: [round(one_s, 4) for one_s in of] for name, of in times.items()},
    }


class _Run:
    """The model's work of one round."""

    def __init__(self, stage: OneStage, writer: HandoffWriter, other: Owner, arguments: argparse.Namespace) -> None:
        self._stage, self._writer, self._other = stage, writer, other
        self._num_steps = arguments.tokens
        self._prompts = [stage.prompt(arguments.prompt_tokens, seed) for seed in range(arguments.prompts)]
        self._first = [0] * len(self._prompts)
        self._attempt = 0

    def prefill(self, is_streaming: bool) -> None:
        self._attempt += 1
        for index, prompt in enumerate(self._prompts):
            span = self._span(index, (0, len(prompt)))
            on_layer = functools.partial(self._writer.submit, span) if is_streaming else None
            self._first[index] = greedy(self._stage.prefill(index, prompt, on_layer))[0]

    def decode(self, is_streaming: bool) -> None:
        self._attempt += 1
        tokens = list(self._first)
        for step in range(self._num_steps):
            positions = [len(prompt) + step for prompt in self._prompts]
            tokens = greedy(self._stage.step(tokens, positions))
            if is_streaming:
                slots = [self._stage.blocks(index)[0] * BLOCK_SIZE + at for index, at in enumerate(positions)]
                self._other.read(slots)

    async def drain(self, *, is_prompt: bool) -> None:
        """Returns when everything has arrived. Raises `LinkError`."""
        await asyncio.to_thread(self._other.drain)
        for index in range(len(self._prompts) if is_prompt else 0):
            error = await asyncio.wrap_future(self._writer.drain(str(index), self._attempt))
            if error is not None:
                raise error

    def _span(self, index: int, tokens: tuple[int, int]) -> HandoffSpan:
        blocks = self._stage.blocks(index)
        return HandoffSpan(str(index), self._attempt, "owner", tokens, blocks, blocks, b"")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("kv_overhead", __doc__)
    add_json(parser)
    add_model(parser)
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="of random tokens, one after the other")
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="N", help="of each prompt")
    tokens = "generated for each prompt, of all prompts at once"
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help=tokens)
    add_runs(parser, 5, "measurements, each of every way")
    return parser


if __name__ == "__main__":
    sys.exit(main())
