"""Moving KV by the names the paper gives: transport (`flush`, `fetch`), layout (`gather`, `scatter`), routing
(`stream_out`, `stream_in`).

All of them are coroutines. When one returns, the bytes are there; when one is cancelled it first lets the copy
under way come to its end, so that the memory may be used again at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
import torch

from common.kv.arrival import pool_checksum
from common.kv.checksum import SpanBinding, hash_tokens
from common.kv.device_copies import copy_between
from common.kv.errors import LinkRefused
from common.kv.geometry import CopyPlan, Range, plan_copies, route
from common.kv.layout import PoolLayout
from common.kv.link import Link
from common.kv.pool import KvPool
from common.kv.quantise import convert
from common.kv.staging import checking_stream
from common.kv.token_ids import ID_BYTES
from dejavu.errors import DejavuError

MAX_IN_FLIGHT = 4
"""Pieces of one `stream_out` that are packed or under way at a time."""
MAX_PIECE_BYTES = 64 << 20
Result = TypeVar("Result")


class KvDamaged(DejavuError):
    """What lies in our pool is not what the writer sent."""

    code = "kv_damaged"


class Region(msgspec.Struct, frozen=True, array_like=True):
    """Tokens x layers x KV heads of a sequence, each [first, end), counted from the model's first."""

    token_range: Range
    layer_range: Range
    head_range: Range

    @property
    def num_tokens(self) -> int:
        return self.token_range[1] - self.token_range[0]


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Part of a sequence that has been written into the pool of peer `peer_index`."""

    peer_index: int
    binding: SpanBinding
    head_range: Range
    checksum: int

    @property
    def region(self) -> Region:
        return Region(self.binding.token_range, self.binding.layer_range, self.head_range)


class SequenceSpan(msgspec.Struct, frozen=True):
    """What of one sequence is to be streamed, and where it lies on both sides: block tables from token 0 on,
    `peer_blocks` one per peer. `token_hash` is the hash of the token ids up to the range's end."""

    sequence_id: str
    token_range: Range
    layer_range: Range
    blocks: Sequence[int]
    peer_blocks: Sequence[Sequence[int]]
    token_hash: bytes


@dataclass(frozen=True, slots=True)
class Peer:
    """One destination: an open link and the layout of the pool behind it."""

    link: Link
    layout: PoolLayout


# ------------------------------------------------------------ transport


async def flush(link: Link, source: KvPool, plan: CopyPlan) -> None:
    """Contiguous pieces of our memory into a peer's pool. Raises `LinkError`, and `ValueError` for a plan that
    leaves the pool."""
    await _to_the_end(link.write(source, plan))


async def fetch(source: KvPool, plan: CopyPlan, destination: KvPool) -> None:
    """Contiguous pieces of memory that this process can read (host tier, packed buffer) into our pool, either of them
    on any device; on a thread of its own, and on a GPU on a side stream."""
    await _to_the_end(asyncio.to_thread(_copy, plan, source, destination))


# ------------------------------------------------------------ layout


async def gather(pool: KvPool, blocks: Sequence[int], region: Region, dtype: str | None = None) -> KvPool:
    """The region in one contiguous buffer [layer][key | value][token][head], as elements of `dtype` (None: as
    in the pool). Raises `ValueError` where the pool or the block table does not hold it."""
    packed = _packed_pool(pool.layout, region)
    plan = plan_copies(
        pool.layout, blocks, packed.layout, packed_blocks(region), region.token_range, region.layer_range,
        region.head_range,
    )  # fmt: skip
    await fetch(pool, plan, packed)
    return packed if dtype in (None, pool.layout.dtype) else await asyncio.to_thread(_converted, packed, str(dtype))


async def scatter(packed: KvPool, region: Region, pool: KvPool, blocks: Sequence[int]) -> None:
    """The inverse: a buffer that `gather` made goes into the pool's blocks, as the pool's elements."""
    if packed.layout.dtype != pool.layout.dtype:
        packed = await asyncio.to_thread(_converted, packed, pool.layout.dtype)
    plan = plan_copies(
        packed.layout, packed_blocks(region), pool.layout, blocks, region.token_range, region.layer_range,
        region.head_range,
    )  # fmt: skip
    await fetch(packed, plan, pool)


def packed_blocks(region: Region) -> Sequence[int]:
    """Block table of a packed buffer, whose blocks hold a token each; what precedes the region is not there."""
    return [0] * region.token_range[0] + list(range(region.num_tokens))


# ------------------------------------------------------------ routing


async def stream_out(pool: KvPool, spans: Sequence[SequenceSpan], peers: Sequence[Peer]) -> list[Piece]:
    """Sends every part of the spans (any batch of sequences) to each peer that owns layers and heads of it. The
    result, one entry per piece, goes to the peers' `stream_in`.

    Peers that differ in their element type get converted values; int8 and fp8 travel with a scale per head. Raises
    `LinkError`; `ValueError` where no peer, or more than one, owns a layer and head that this pool has. At most
    `MAX_IN_FLIGHT` pieces are under way; the first error cancels the others, which end before it is raised.
    """
    room = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def send(span: SequenceSpan, index: int, region: Region) -> Piece:
        async with room:
            return await _send(pool, span, index, peers[index], region)

    wanted = [(span, *part) for span in spans for part in _parts(pool, span, peers)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(send(*one)) for one in wanted]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def stream_in(
    pool: KvPool,
    blocks: Sequence[int],
    sequence_id: str,
    region: Region,
    pieces: AsyncIterable[Piece],
    *,
    token_ids: bytes,
    landing: tuple[KvPool, Sequence[int]] | None = None,
) -> None:
    """Returns once the whole region has arrived and was found intact. Pieces of other sequences are passed
    over. `token_ids` (int32, little-endian, from token 0 on) are those that the KV must belong to.

    With `landing` the pieces arrive in that pool's blocks, whose elements are the ones that travel (int8, say), and go
    from there into ours, as ours. Raises `KvDamaged` for a piece that does not match our memory or our ids, or if
    `pieces` end too early."""
    arrived, table = landing or (pool, blocks)
    (start, end), (first, last), (low, high) = region.token_range, region.layer_range, region.head_range
    missing = np.ones((last - first, high - low, end - start), dtype=bool)
    async for piece in pieces:
        binding, heads = piece.binding, piece.head_range
        if binding.sequence_id != sequence_id:
            continue
        await _verify(arrived, table, piece, token_ids)
        missing[_within(binding.layer_range, first), _within(heads, low), _within(binding.token_range, start)] = False
        if not missing.any():
            break
    if missing.any():
        raise KvDamaged(f"{arrived.name}: {int(missing.sum())} parts of {sequence_id} {region} never came")
    if landing is not None:
        await scatter(await gather(arrived, table, region), region, pool, blocks)


async def _verify(pool: KvPool, blocks: Sequence[int], piece: Piece, token_ids: bytes) -> None:
    expected = msgspec.structs.replace(
        piece.binding,
        fingerprint=pool.layout.fingerprint,
        token_hash=hash_tokens(token_ids[: ID_BYTES * piece.binding.token_range[1]]),
    )
    what = f"{piece.binding.sequence_id} {piece.region}"
    if piece.binding.token_hash != expected.token_hash:
        raise KvDamaged(f"{pool.name}: {what} belongs to other tokens than ours")
    try:
        found = await _to_the_end(asyncio.to_thread(pool_checksum, pool, blocks, expected, piece.head_range))
    except ValueError as error:
        raise KvDamaged(f"{pool.name} cannot hold a piece of {what}: {error}") from error
    if found != piece.checksum:
        raise KvDamaged(f"{pool.name}: {what} is not what was sent")


def _parts(pool: KvPool, span: SequenceSpan, peers: Sequence[Peer]) -> list[tuple[int, Region]]:
    """Which peer gets what, in pieces of bounded size."""
    parts: list[tuple[int, Region]] = []
    own = pool.layout.heads
    shards = sorted({peer.layout.heads for peer in peers})
    for shard_index, heads in route(shards, own):
        indexes = [index for index, peer in enumerate(peers) if peer.layout.heads == shards[shard_index]]
        indexes.sort(key=lambda index: peers[index].layout.first_layer)
        for at, layers in route([peers[index].layout.layers for index in indexes], span.layer_range):
            layer_bytes = (span.token_range[1] - span.token_range[0]) * pool.layout.bytes_per_token_layer
            step = max(1, MAX_PIECE_BYTES // layer_bytes)
            for first in range(*layers, step):
                some = (first, min(first + step, layers[1]))
                parts.append((indexes[at], Region(span.token_range, some, heads)))
    return parts


async def _send(pool: KvPool, span: SequenceSpan, index: int, peer: Peer, region: Region) -> Piece:
    source, blocks = pool, span.blocks
    # but for one link they take host memory
    is_within_reach = pool.is_host or peer.link.name == "cuda_ipc"
    if pool.layout.dtype != peer.layout.dtype or not is_within_reach:
        source, blocks = await gather(pool, blocks, region, peer.layout.dtype), packed_blocks(region)
    if pool.layout.fingerprint != peer.layout.fingerprint:
        raise LinkRefused(f"{pool.name} holds {pool.layout.fingerprint}, the peer {peer.layout.fingerprint}")
    plan = plan_copies(
        source.layout, blocks, peer.layout, span.peer_blocks[index], region.token_range, region.layer_range,
        region.head_range,
    )  # fmt: skip
    await flush(peer.link, source, plan)
    binding = SpanBinding(
        peer.layout.fingerprint, span.sequence_id, region.layer_range, region.token_range, span.token_hash
    )
    checksum = await _to_the_end(asyncio.to_thread(pool_checksum, source, blocks, binding, region.head_range))
    return Piece(index, binding, region.head_range, checksum)


def _packed_pool(like: PoolLayout, region: Region) -> KvPool:
    (first, last), (low, high) = region.layer_range, region.head_range
    layout = msgspec.structs.replace(
        like, first_layer=first, last_layer=last, num_blocks=region.num_tokens, block_size=1, first_head=low,
        num_kv_heads=high - low,
    )  # fmt: skip
    return KvPool(layout, torch.empty(layout.total_bytes, dtype=torch.uint8), None, "packed")


def _converted(packed: KvPool, dtype: str) -> KvPool:
    """The same values as other elements, rounded to nearest."""
    layout = msgspec.structs.replace(packed.layout, dtype=dtype)
    heads = packed.arena.view(-1, packed.layout.head_bytes)
    return KvPool(layout, convert(heads, packed.layout.dtype, dtype).reshape(-1), None, packed.name)


def _copy(plan: CopyPlan, source: KvPool, destination: KvPool) -> None:
    with checking_stream((destination if source.is_host else source).device).work():
        copy_between(plan, source, destination)


def _within(inner: Range, start: int) -> slice:
    return slice(max(0, inner[0] - start), max(0, inner[1] - start))


async def _to_the_end(work: Awaitable[Result]) -> Result:
    """A cancelled copy is waited for: until it is over, its memory is not ours to use."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody is left to hear of it
        raise
