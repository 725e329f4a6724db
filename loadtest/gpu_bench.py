"""How fast KV moves on a GPU: `python -m loadtest.gpu_bench --json FILE`.

Three things, each beside a plain copy of as many bytes in the same run, taken in turns. *Links*: writes into, and reads
from, the GPU memory of another process, beside a copy within the device. *Swaps*: sequences between a page-locked host
pool and the device on a side stream, beside the one large copy that the host link allows; and what they cost a matrix
product that runs meanwhile. *Hand-off*: a prompt layer by layer into the other process, checksums included.
"""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from common.kv.choice import restricted
from common.kv.copies import check_plan
from common.kv.cuda_driver import gpu_ids
from common.kv.device_copies import copy_between
from common.kv.geometry import CopyPlan, plan_copies, plan_slots
from common.kv.link import GrantOffer, open_link
from common.kv.page_lock import PageLock
from common.kv.pool import KvPool
from common.kv.staging import SideStream
from loadtest.figures import save
from loadtest.kv_bench import HANDOFF_TOKENS, LAYOUT, Way, handoff_cell, in_turns
from loadtest.kv_owner import owner
from loadtest.machine import describe_machine
from loadtest.options import add_json, add_runs, new_parser

_new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event
Plans = list[tuple[str, CopyPlan]]


def main() -> int:
    """Runs the benchmark; 0 also where there is no GPU."""
    parser = new_parser("gpu_bench", __doc__)
    add_json(parser)
    add_runs(parser, 7, "measurements per cell; each tries every way once")
    arguments = parser.parse_args()
    if not gpu_ids():
        print("no CUDA device here: nothing to measure")
        return 0
    results: dict[str, Any] = {"machine": describe_machine(), "gpu": torch.cuda.get_device_name(0)}
    with owner(LAYOUT, "cuda") as other:
        results |= asyncio.run(_measure(other.offer, arguments.runs))
    _show(results)
    save(arguments.json, results)
    return 0


async def _measure(offer: GrantOffer, num_rounds: int) -> dict[str, Any]:
    device = KvPool.create(LAYOUT, "cuda", name="writer")
    device.arena.random_(0, 256)
    torch.cuda.synchronize()
    return {
        "links": await _links(offer, device, num_rounds),
        "swaps": await _swaps(device, num_rounds),
        "beside_compute": _beside_compute(device),
        "handoff": await _handoff(offer, device, num_rounds),
    }


async def _links(offer: GrantOffer, device: KvPool, num_rounds: int) -> list[dict[str, Any]]:
    """Writes and reads, one entry per shape and size."""
    link = await open_link(restricted(offer, "cuda_ipc"), device)
    if link.name != "cuda_ipc":
        print("the memory of a GPU cannot be shared between processes here")
        await link.aclose()
        return []
    private = torch.empty_like(device.arena)
    cells = []
    for shape, plan in _link_plans():
        size = plan.total_bytes
        ways: dict[str, Way] = {
            "device copy": functools.partial(_whole, private, device.arena, size),
            f"{link.name} write": functools.partial(link.write, device, plan),
            f"{link.name} read": functools.partial(link.read, device, plan),
        }
        figures = await in_turns(ways, size, num_rounds)
        cells.append({"shape": shape, "size_bytes": size, "num_pieces": len(plan), "ways": figures})
    await link.aclose()
    return cells


def _link_plans() -> Iterator[tuple[str, CopyPlan]]:
    for size in (64 << 10, 1 << 20, 16 << 20, 256 << 20):
        yield "contiguous", CopyPlan(np.array([0]), np.array([0]), np.array([size]))
    yield from _scattered_plans()


def _scattered_plans() -> Plans:
    """Blocks that are in no order on either side."""
    draws = np.random.default_rng(1)
    ours, theirs = (draws.permutation(LAYOUT.num_blocks) for _ in range(2))
    slots = [blocks[:64] * LAYOUT.block_size + 3 for blocks in (ours, theirs)]
    tables = ours.tolist(), theirs.tolist()
    return [
        ("64 tokens x all layers", plan_slots(LAYOUT, slots[0], LAYOUT, slots[1], LAYOUT.layers, LAYOUT.heads)),
        ("one layer x prompt", plan_copies(LAYOUT, tables[0], LAYOUT, tables[1], (0, HANDOFF_TOKENS), (5, 6))),
        ("whole sequence", plan_copies(LAYOUT, tables[0], LAYOUT, tables[1], (0, HANDOFF_TOKENS), LAYOUT.layers)),
    ]


def _in_a_row() -> CopyPlan:
    """A sequence in one run of blocks, as the allocator prefers."""
    blocks = range(HANDOFF_TOKENS // LAYOUT.block_size)
    return plan_copies(LAYOUT, blocks, LAYOUT, blocks, (0, HANDOFF_TOKENS), LAYOUT.layers)


async def _whole(to: torch.Tensor, source: torch.Tensor, size: int) -> None:
    """One large copy."""
    to[:size].copy_(source[:size], non_blocking=True)
    torch.cuda.synchronize()


async def _swaps(device: KvPool, num_rounds: int) -> list[dict[str, Any]]:
    """In and out, with and without the GPU reaching into the host's memory."""
    host, stream = KvPool.create(LAYOUT, name="host"), SideStream(device.device)
    lock = PageLock(host, device.device)
    cells = []
    plans: Sequence[tuple[str, CopyPlan]] = [("sequence in a row", _in_a_row()), *_scattered_plans()]

    async def swap(plan: CopyPlan, source: KvPool, to: KvPool, seen: torch.Tensor | None) -> None:
        with stream.work():
            copy_between(plan, source, to, seen)

    for shape, plan in plans:
        size = plan.total_bytes
        check_plan(plan, LAYOUT.total_bytes, LAYOUT.total_bytes)
        ways: dict[str, Way] = {
            "host to device": functools.partial(_whole, device.arena, host.arena, size),
            "device to host": functools.partial(_whole, host.arena, device.arena, size),
            "in": functools.partial(swap, plan, host, device, lock.seen),
            "out": functools.partial(swap, plan, device, host, lock.seen),
            "in, by the host": functools.partial(swap, plan, host, device, None),
            "out, by the host": functools.partial(swap, plan, device, host, None),
        }
        figures = await in_turns(ways, size, num_rounds)
        cells.append({"shape": shape, "size_bytes": size, "num_pieces": len(plan), "ways": figures})
    lock.close()
    host.close()
    return cells


def _beside_compute(device: KvPool) -> list[dict[str, Any]]:
    """Matrix products on the current stream while sequences come in on another."""
    host, stream = KvPool.create(LAYOUT, name="host"), SideStream(device.device)
    lock = PageLock(host, device.device)
    factor = torch.randn(4096, 4096, device=device.device, dtype=torch.bfloat16)
    cells = []
    for shape, plan in (("sequence in a row", _in_a_row()), _scattered_plans()[-1]):
        alone_s = min(_products_s(factor) for _ in range(3))
        swap_s, num_swaps = 0.0, 8
        begun, ended = _new_event(enable_timing=True), _new_event(enable_timing=True)
        begun.record()
        for _ in range(400):
            torch.mm(factor, factor)
        ended.record()
        for _ in range(num_swaps):
            started_s = time.perf_counter()
            with stream.work():
                copy_between(plan, host, device, lock.seen)
            swap_s += time.perf_counter() - started_s
        torch.cuda.synchronize()
        beside_s = begun.elapsed_time(ended) / 1e3 / 400
        cells.append(
            {
                "shape": shape,
                "product_alone_us": round(alone_s * 1e6, 1),
                "product_beside_swaps_us": round(beside_s * 1e6, 1),
                "swap_gb_per_s": round(num_swaps * plan.total_bytes / swap_s / 1e9, 2),
                "swaps_s": round(swap_s, 4),
                "products_s": round(400 * beside_s, 4),
            }
        )
    lock.close()
    host.close()
    return cells


def _products_s(factor: torch.Tensor, count: int = 100) -> float:
    begun, ended = _new_event(enable_timing=True), _new_event(enable_timing=True)
    begun.record()
    for _ in range(count):
        torch.mm(factor, factor)
    ended.record()
    torch.cuda.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3 / count


async def _handoff(offer: GrantOffer, device: KvPool, num_rounds: int) -> dict[str, Any]:
    size = HANDOFF_TOKENS * LAYOUT.num_layers * LAYOUT.bytes_per_token_layer
    copy = functools.partial(_whole, torch.empty_like(device.arena), device.arena, size)
    return await handoff_cell(offer, device, {"device copy": copy}, num_rounds)


def _show(results: dict[str, Any]) -> None:
    print(results["gpu"])
    for cell in [*results["links"], *results["swaps"], results["handoff"]]:
        ways = cell["ways"]
        shown = (f"{name} {way['median_us']:.0f} us {way['median_gb_per_s']} GB/s" for name, way in ways.items())
        print(
            f"{cell.get('shape', 'hand-off ' + str(cell.get('link'))):>22} {cell['size_bytes']:>11}", " | ".join(shown)
        )
    for cell in results["beside_compute"]:
        print(json.dumps(cell))


if __name__ == "__main__":
    sys.exit(main())
