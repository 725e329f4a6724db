"""How fast KV moves between two processes: `python -m loadtest.kv_bench --json FILE`.

Per link, shape and size: the time of one write from this process into the pool of another, its GB/s, and both beside a
plain copy of as many bytes within this process, taken in turns in the same run. The shapes: one contiguous piece; a
token of each of several sequences in all layers; one layer of a prompt; a whole sequence. All but the first lie in
blocks that are scattered on both sides. Then checksums, plans and a whole hand-off.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import statistics
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from common.kv.checksum import SpanBinding, span_checksum
from common.kv.choice import restricted
from common.kv.geometry import CopyPlan, plan_copies, plan_slots
from common.kv.layout import PoolLayout
from common.kv.link import GrantOffer, Link, open_link
from common.kv.native import load_native
from common.kv.pool import Bytes, KvPool
from common.kv.stream import HandoffSpan, HandoffWriter
from loadtest.figures import save
from loadtest.kv_owner import owner
from loadtest.machine import describe_machine
from loadtest.nixl_bench import BareNixl
from loadtest.options import add_json, add_runs, new_parser

LAYOUT = PoolLayout(
    first_layer=0,
    last_layer=32,
    num_blocks=160,
    block_size=16,
    num_kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    fingerprint="bench",
)
"""32 layers of 8 heads x 128 in bfloat16, 2,560 tokens: 336 MB."""
SIZES_BYTES = [4096 << (2 * power) for power in range(9)]
HANDOFF_TOKENS = 2048
Writer = Link | BareNixl
Way = Callable[[], Awaitable[None]]


def main() -> int:
    """Runs the benchmark."""
    parser = new_parser("kv_bench", __doc__)
    add_json(parser)
    add_runs(parser, 7, "measurements per cell; each tries every way once")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": describe_machine(), "options": vars(arguments)}
    with owner(LAYOUT) as other:
        results |= asyncio.run(_measure(other.offer, arguments.runs))
    _show(results)
    save(arguments.json, results)
    return 0


async def _measure(offer: GrantOffer, num_rounds: int) -> dict[str, Any]:
    source = KvPool.create(LAYOUT, name="writer")
    source.memory[:] = np.random.default_rng(0).integers(0, 256, LAYOUT.total_bytes, dtype=np.uint8)
    private = np.zeros(LAYOUT.total_bytes, dtype=np.uint8)
    names = ["shm", *(["nixl"] if offer.has_nixl else []), "zmq"]
    offers = {name: restricted(offer, name) for name in names}
    links: list[Writer] = [await open_link(one, source) for one in offers.values()]
    if offer.has_nixl:
        links.append(await BareNixl.open(offer, source))
    figures = {
        "writes": [await _write_cell(shape, plan, links, source, private, num_rounds) for shape, plan in _shapes()],
        "span": await _span_cell(source, private, num_rounds),
    }
    for link in links:
        await link.aclose()
    copy = _memcpy(source, private, HANDOFF_TOKENS * LAYOUT.num_layers * LAYOUT.bytes_per_token_layer)
    handoffs = [await handoff_cell(one, source, {"memcpy": copy}, num_rounds) for one in offers.values()]
    return figures | {"targets": _targets(figures), "handoff": handoffs}


def _shapes() -> Iterator[tuple[str, CopyPlan]]:
    """What is written, by shape and rising size."""
    for size in SIZES_BYTES:
        yield "contiguous", CopyPlan(np.array([0]), np.array([0]), np.array([size]))
    draws = np.random.default_rng(1)
    ours, theirs = (draws.permutation(LAYOUT.num_blocks) for _ in range(2))
    all_layers = LAYOUT.layers
    for num_sequences in (1, 8, 64):
        slots = [blocks[:num_sequences] * LAYOUT.block_size + 3 for blocks in (ours, theirs)]
        yield "token x all layers", plan_slots(LAYOUT, slots[0], LAYOUT, slots[1], all_layers, LAYOUT.heads)
    for shape, layers in (("one layer x prompt", (5, 6)), ("whole sequence", all_layers)):
        for num_tokens in (1, 16, 128, 512, HANDOFF_TOKENS):
            plan = plan_copies(LAYOUT, ours.tolist(), LAYOUT, theirs.tolist(), (0, num_tokens), layers)
            yield shape, plan


async def _write_cell(
    shape: str, plan: CopyPlan, links: Sequence[Writer], source: KvPool, private: Bytes, num_rounds: int
) -> dict[str, Any]:
    size = plan.total_bytes
    ways: dict[str, Way] = {"memcpy": _memcpy(source, private, size)}
    native = load_native()
    if len(plan) > 1 and native is not None:
        pieces = (plan.source_offset, private, plan.destination_offset, plan.num_bytes)
        ways["memcpy of the pieces"] = _as_work(functools.partial(native.copy, source.memory, *pieces, is_big=False))
    for link in links:
        ways[link.name] = functools.partial(link.write, source, plan)
    figures = await in_turns(ways, size, num_rounds)
    return {"shape": shape, "size_bytes": size, "num_pieces": len(plan), "ways": figures}


def _memcpy(source: KvPool, private: Bytes, size: int) -> Way:
    async def memcpy() -> None:
        private[:size] = source.memory[:size]

    return memcpy


def _as_work(function: Callable[[], None]) -> Way:
    async def work() -> None:
        function()

    return work


def _targets(figures: dict[str, Any]) -> dict[str, Any]:
    """Shared memory beside what it is meant to reach: 80 % of memcpy from 1 MiB on, 30 us more at 64 KiB; a plan for
    2,048 tokens x 32 layers in 2 ms. The transfer library's link: 80 % of what the library does alone."""
    contiguous = [cell for cell in figures["writes"] if cell["shape"] == "contiguous"]
    scattered = [cell for cell in figures["writes"] if "memcpy of the pieces" in cell["ways"]]
    small = next(cell["ways"] for cell in contiguous if cell["size_bytes"] == 64 << 10)
    return {
        "shm_share_of_memcpy": _shares(contiguous, "shm", "memcpy"),
        "shm_share_of_memcpy_of_the_pieces": _shares(scattered, "shm", "memcpy of the pieces"),
        "nixl_share_of_the_library": _shares(figures["writes"], "nixl", "nixl alone"),
        "shm_overhead_at_64_kib_us": round(small["shm"]["median_us"] - small["memcpy"]["median_us"], 1),
        "plan_us": figures["span"]["ways"]["plan"]["median_us"],
    }


def _shares(cells: Sequence[dict[str, Any]], way: str, reference: str) -> dict[str, float]:
    """How much of the reference's speed a way has, by shape and size."""
    return {
        f"{cell['shape']}, {cell['size_bytes']}": round(
            cell["ways"][reference]["median_us"] / cell["ways"][way]["median_us"], 3
        )
        for cell in cells
        if way in cell["ways"]
    }


async def _span_cell(source: KvPool, private: Bytes, num_rounds: int) -> dict[str, Any]:
    """What a hand-off of a whole prompt costs besides the copy: the plan, the checksum."""
    blocks, tokens, layers = range(HANDOFF_TOKENS // 16), (0, HANDOFF_TOKENS), (0, 32)
    binding = SpanBinding("bench", "sequence", layers, tokens, b"")
    size = HANDOFF_TOKENS * 32 * LAYOUT.bytes_per_token_layer

    async def plan() -> None:
        plan_copies(LAYOUT, blocks, LAYOUT, blocks, tokens, layers)

    async def checksum() -> None:
        span_checksum(source.memory, LAYOUT, blocks, binding)

    async def crc32() -> None:
        zlib.crc32(source.memory[:size].data)

    copy = _memcpy(source, private, size)
    ways: dict[str, Way] = {"memcpy": copy, "plan": plan, "checksum": checksum, "crc32": crc32}
    return {"size_bytes": size, "ways": await in_turns(ways, size, num_rounds)}


async def handoff_cell(offer: GrantOffer, source: KvPool, copies: Mapping[str, Way], num_rounds: int) -> dict[str, Any]:
    """A whole prompt layer by layer, checksums included, from the first `submit` until `drain`; beside `copies`."""
    writer = await HandoffWriter.start(source, lambda arrival: None)
    await writer.connect("bench", [offer])
    blocks = range(HANDOFF_TOKENS // LAYOUT.block_size)
    size = HANDOFF_TOKENS * LAYOUT.num_layers * LAYOUT.bytes_per_token_layer
    attempts = itertools.count()

    async def handoff() -> None:
        attempt = next(attempts)
        span = HandoffSpan("sequence", attempt, "bench", (0, HANDOFF_TOKENS), blocks, blocks, b"")
        for layer in range(LAYOUT.num_layers):
            writer.submit(span, layer)
        error = await asyncio.wrap_future(writer.drain("sequence", attempt))
        if error is not None:
            raise error

    figures = await in_turns({**copies, "handoff": handoff}, size, num_rounds)
    [kind] = writer.links("bench")
    await writer.aclose()
    return {"link": kind, "size_bytes": size, "num_tokens": HANDOFF_TOKENS, "ways": figures}


async def in_turns(ways: dict[str, Way], size: int, num_rounds: int) -> dict[str, Any]:
    """Every way once per round, so that a disturbance hits all of them."""
    repeats = min(64, max(1, (4 << 20) // size))
    taken_s: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(num_rounds + 1):
        for name, way in ways.items():
            started_s = time.perf_counter()
            for _ in range(repeats):
                await way()
            if round_number:  # the first warms up
                taken_s[name].append((time.perf_counter() - started_s) / repeats)
    return {name: _figures(times, size) for name, times in taken_s.items()}


def _figures(times_s: list[float], size: int) -> dict[str, Any]:
    median_s, best_s = statistics.median(times_s), min(times_s)
    return {
        "median_us": round(median_s * 1e6, 1),
        "best_us": round(best_s * 1e6, 1),
        "median_gb_per_s": round(size / median_s / 1e9, 2),
        "best_gb_per_s": round(size / best_s / 1e9, 2),
        "all_us": [round(taken_s * 1e6, 1) for taken_s in times_s],
    }


def _show(results: dict[str, Any]) -> None:
    for cell in [*results["writes"], results["span"], *results["handoff"]]:
        ways = cell["ways"]
        shown = (f"{name} {way['median_us']:.0f} us {way['median_gb_per_s']} GB/s" for name, way in ways.items())
        what = cell.get("shape", f"hand-off {cell.get('link', '(parts)')}")
        print(f"{what:>18} {cell['size_bytes']:>11}", " | ".join(shown))
    print(results["targets"])


if __name__ == "__main__":
    sys.exit(main())
