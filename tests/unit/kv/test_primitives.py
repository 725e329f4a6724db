"""The primitives against a reference cache: any cut of the model on both sides."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence

import msgspec
import numpy as np
import pytest
import torch

from common.kv.checksum import hash_tokens
from common.kv.copies import copy_pieces
from common.kv.errors import LinkRefused
from common.kv.geometry import CopyPlan, Range, plan_copies
from common.kv.layout import PoolLayout
from common.kv.link import open_link
from common.kv.pool import Bytes, KvPool
from common.kv.primitives import KvDamaged, Peer, Piece, Region, SequenceSpan, gather, scatter, stream_in, stream_out
from common.kv.quantise import WIRE_DTYPES, max_error
from common.kv.server import PoolServer
from tests.unit.kv.reference import NUM_HEADS, NUM_LAYERS, ReferenceCache, layout, random_pair, table

HASH = hash_tokens(b"")
ALL_LAYERS, ALL_HEADS = (0, NUM_LAYERS), (0, NUM_HEADS)


class LocalLink:
    """A link into a pool of the same process."""

    name = "local"
    is_over = False

    def __init__(self, memory: Bytes) -> None:
        self._memory = memory
        self.num_running = self.max_running = 0
        self.started = asyncio.Event()

    async def write(self, source: KvPool, plan: CopyPlan) -> None:
        self.num_running += 1
        self.started.set()
        self.max_running = max(self.max_running, self.num_running)
        await asyncio.to_thread(copy_pieces, plan, source.memory, self._memory)
        self.num_running -= 1

    async def read(self, destination: KvPool, plan: CopyPlan) -> None:
        await asyncio.to_thread(copy_pieces, plan, self._memory, destination.memory)

    async def aclose(self) -> None:
        pass


def pool_of(pool_layout: PoolLayout, memory: Bytes, name: str = "pool") -> KvPool:
    return KvPool(pool_layout, torch.from_numpy(memory), None, name)


async def each(pieces: Sequence[Piece]) -> AsyncIterator[Piece]:
    for piece in pieces:
        yield piece


def cuts(generator: random.Random, end: int) -> list[Range]:
    """Uneven stages, or shards, of [0, end)."""
    inner = sorted(generator.sample(range(1, end), generator.randint(0, 3)))
    return list(zip([0, *inner], [*inner, end], strict=True))


async def test_thousands_of_gathers_and_scatters_equal_the_reference() -> None:
    for seed in range(2000):
        pair = random_pair(random.Random(seed))
        cache = ReferenceCache(pair.source, pair.num_tokens, seed)
        region = Region(pair.token_range, pair.layer_range, pair.head_range)
        source = pool_of(pair.source, cache.written_to(pair.source, pair.source_blocks))
        destination = pool_of(pair.destination, np.full(pair.destination.total_bytes, 0xAA, dtype=np.uint8))
        await scatter(await gather(source, pair.source_blocks, region), region, destination, pair.destination_blocks)
        expected = cache.written_to(
            pair.destination, pair.destination_blocks, pair.token_range, pair.layer_range, pair.head_range, 0xAA
        )
        assert np.array_equal(destination.memory, expected), f"seed {seed}"


@pytest.mark.parametrize("part", range(4))
async def test_batches_stream_between_models_cut_in_any_way(part: int) -> None:
    for seed in range(part * 125, part * 125 + 125):
        await _stream_between_random_models(seed)


async def _stream_between_random_models(seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 40) for _ in range(generator.randint(1, 3))]
    caches = [ReferenceCache(layout(), length, seed + index) for index, length in enumerate(lengths)]
    sources = _model(generator, lengths)
    peers = _model(generator, lengths)
    memories = [np.zeros(one.total_bytes, dtype=np.uint8) for one, _ in peers]
    links = [Peer(LocalLink(memory), one) for memory, (one, _) in zip(memories, peers, strict=True)]
    pieces: list[Piece] = []
    for one, tables in sources:
        memory = sum(
            (cache.written_to(one, blocks) for cache, blocks in zip(caches, tables, strict=True)),
            np.zeros(one.total_bytes, dtype=np.uint8),
        )
        spans = [
            SequenceSpan(str(at), (0, length), one.layers, tables[at], [blocks[at] for _, blocks in peers], HASH)
            for at, length in enumerate(lengths)
        ]
        pieces += await stream_out(pool_of(one, memory), spans, links)
    for index, (one, tables) in enumerate(peers):
        to, own = pool_of(one, memories[index]), [piece for piece in pieces if piece.peer_index == index]
        for at, length in enumerate(lengths):
            await stream_in(
                to, tables[at], str(at), Region((0, length), one.layers, one.heads), each(own), token_ids=b""
            )
        expected = [cache.written_to(one, blocks) for cache, blocks in zip(caches, tables, strict=True)]
        assert np.array_equal(memories[index], sum(expected[1:], expected[0])), f"seed {seed}"


def _model(generator: random.Random, lengths: Sequence[int]) -> list[tuple[PoolLayout, list[list[int]]]]:
    """Pools of a whole model, stages x head shards, each with a block table per sequence."""
    model = []
    shards = cuts(generator, NUM_HEADS)
    for stage in cuts(generator, NUM_LAYERS):
        for shard in shards:
            block_size = generator.choice([1, 2, 4, 16])
            counts = [-(-length // block_size) for length in lengths]
            blocks = table(generator, sum(counts) + 3, sum(counts))
            tables = [[blocks.pop() for _ in range(count)] for count in counts]
            one = layout(
                first_layer=stage[0], last_layer=stage[1], first_head=shard[0], num_kv_heads=shard[1] - shard[0],
                block_size=block_size, num_blocks=sum(counts) + 3,
            )  # fmt: skip
            model.append((one, tables))
    return model


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tokens", [(0, 1500), (1200, 1500)])
async def test_long_spans_and_other_element_types(dtype: str, tokens: Range) -> None:
    ours = layout(num_blocks=400)
    theirs = layout(num_blocks=100, block_size=16, dtype=dtype)
    source, destination = KvPool.create(ours, name="ours"), KvPool.create(theirs, name="theirs")
    source.arena.view(torch.float32).normal_(generator=torch.Generator().manual_seed(1))
    span = SequenceSpan("long", tokens, (0, 4), range(399, -1, -1), [range(100)], HASH)
    link = LocalLink(destination.memory)
    pieces = await stream_out(source, [span], [Peer(link, theirs)])
    region = Region(tokens, (0, 4), ours.heads)
    await stream_in(destination, range(100), "long", region, each(pieces), token_ids=b"")
    got = (await gather(destination, range(100), region)).arena.view(getattr(torch, dtype))
    sent = (await gather(source, range(399, -1, -1), region)).arena.view(torch.float32)
    assert torch.equal(got, sent.to(getattr(torch, dtype))) and got.abs().sum() > 0


async def test_damage_and_absence_are_errors() -> None:
    ours = layout()
    source, destination = KvPool.create(ours), KvPool.create(ours)
    source.memory[:] = 7
    span = SequenceSpan("one", (0, 9), (0, 4), [0, 1, 2], [[4, 5, 6]], HASH)
    pieces = await stream_out(source, [span], [Peer(LocalLink(destination.memory), ours)])
    region = Region((0, 9), (0, 4), ours.heads)
    with pytest.raises(KvDamaged, match="never came"):
        await stream_in(destination, [4, 5, 6], "other", region, each(pieces), token_ids=b"")
    claimed = msgspec.structs.replace(pieces[0].binding, token_range=(0, 8))
    with pytest.raises(KvDamaged, match="belongs to other tokens"):
        await stream_in(destination, [4, 5, 6], "one", region, each(pieces), token_ids=b"1234")
    with pytest.raises(KvDamaged, match="not what was sent"):
        wrong = msgspec.structs.replace(pieces[0], binding=claimed)
        await stream_in(destination, [4, 5, 6], "one", region, each([wrong]), token_ids=b"")
    destination.layer(2)[1][5, 1, 0, 3] += 1
    with pytest.raises(KvDamaged, match="not what was sent"):
        await stream_in(destination, [4, 5, 6], "one", region, each(pieces), token_ids=b"")


async def test_few_pieces_are_in_flight_and_cancelling_leaves_none() -> None:
    ours = layout()
    source, destination = KvPool.create(ours), KvPool.create(ours)
    link = LocalLink(destination.memory)
    spans = [SequenceSpan(str(at), (0, 4), (0, 4), [at % 8], [[at % 8]], b"") for at in range(200)]
    await stream_out(source, spans, [Peer(link, ours)])
    link.started.clear()
    assert 1 < link.max_running <= 4
    sending = asyncio.create_task(stream_out(source, spans, [Peer(link, ours)]))
    await link.started.wait()
    assert link.num_running
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert link.num_running == 0


async def test_over_a_real_link() -> None:
    ours, theirs = layout(), layout(block_size=2, num_blocks=16)
    source, destination = KvPool.create(ours, name="ours"), KvPool.create(theirs, name="theirs")
    source.memory[:] = np.random.default_rng(0).integers(0, 256, ours.total_bytes, dtype=np.uint8)
    server = await PoolServer.start(destination, "127.0.0.1", "first")
    link = await open_link(server.offer, source)
    span = SequenceSpan("one", (0, 32), (0, 4), range(8), [range(16)], HASH)
    pieces = await stream_out(source, [span], [Peer(link, theirs)])
    await stream_in(destination, range(16), "one", Region((0, 32), (0, 4), ours.heads), each(pieces), token_ids=b"")
    straight = np.zeros(theirs.total_bytes, dtype=np.uint8)
    copy_pieces(plan_copies(ours, range(8), theirs, range(16), (0, 32), (0, 4)), source.memory, straight)
    assert np.array_equal(destination.memory, straight)
    await link.aclose()
    await server.aclose()


def test_a_model_with_a_hole_is_refused() -> None:
    ours = layout()
    half = Peer(LocalLink(np.zeros(1, dtype=np.uint8)), layout(last_layer=2))
    span = SequenceSpan("one", (0, 4), (0, 4), [0], [[0]], b"")
    with pytest.raises(ValueError, match="do not own"):
        asyncio.run(stream_out(KvPool.create(ours), [span], [half]))


@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_few_bits_travel_between_pools_of_any_type(wire: str, dtype: str) -> None:
    """The receiver lets the pieces land as they travel; what it then has is off by no more than the codes are apart."""
    for seed in range(50):
        generator = random.Random(seed)
        length = generator.randint(1, 100)
        ours, theirs = layout(num_blocks=50), layout(num_blocks=120, block_size=1, dtype=dtype)
        travels = layout(num_blocks=8, block_size=16, dtype=wire)
        source, landing, pool = KvPool.create(ours), KvPool.create(travels), KvPool.create(theirs)
        source.arena.view(torch.float32).normal_(generator=torch.Generator().manual_seed(seed))
        blocks, own, land = table(generator, 50, 25), table(generator, 120, length), table(generator, 8, 7)
        span = SequenceSpan("one", (0, length), ours.layers, blocks, [land], HASH)
        pieces = await stream_out(source, [span], [Peer(LocalLink(landing.memory), travels)])
        region = Region((0, length), ours.layers, ours.heads)
        await stream_in(pool, own, "one", region, each(pieces), token_ids=b"", landing=(landing, land))
        sent = (await gather(source, blocks, region)).arena.view(torch.float32).view(-1, ours.head_dim)
        got = (await gather(pool, own, region, "float32")).arena.view(torch.float32).view(-1, ours.head_dim)
        allowed = max_error(sent, wire)
        rounding = 2.0**-8 * (sent.abs() + allowed) if dtype == "bfloat16" else 0.0
        assert bool(((got - sent).abs() <= allowed + rounding).all())
        assert not torch.equal(got, sent)
    with pytest.raises(TypeError, match="nobody computes"):
        landing.layer(0)


async def test_few_bits_over_a_real_link() -> None:
    ours, travels = layout(), layout(dtype="int8")
    source, landing, pool = (
        KvPool.create(ours, name="ours"),
        KvPool.create(travels, name="landing"),
        KvPool.create(ours),
    )
    source.arena.view(torch.float32).normal_(generator=torch.Generator().manual_seed(1))
    server = await PoolServer.start(landing, "127.0.0.1", "first")
    with pytest.raises(LinkRefused, match="dtype of ours is float32, of landing it is int8"):
        await open_link(server.offer, source)
    link = await open_link(server.offer, source, travels_as="int8")
    span = SequenceSpan("one", (0, 32), ours.layers, range(8), [range(8)], HASH)
    pieces = await stream_out(source, [span], [Peer(link, travels)])
    region = Region((0, 32), ours.layers, ours.heads)
    await stream_in(pool, range(8), "one", region, each(pieces), token_ids=b"", landing=(landing, range(8)))
    assert torch.allclose(pool.arena.view(torch.float32), source.arena.view(torch.float32), atol=0.02)
    await link.aclose()
    await server.aclose()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
async def test_out_of_device_memory_and_back(device: str) -> None:
    """Gathered, scattered and streamed like host memory; `device` is the receiver's."""
    ours, blocks, own = layout(), [7, 1, 2, 0], [3, 6, 5, 4]
    source, back, pool = KvPool.create(ours, "cuda"), KvPool.create(ours, "cuda"), KvPool.create(ours, device)
    values = torch.randint(0, 256, (ours.total_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    source.arena.copy_(values)
    host = pool_of(ours, values.numpy().copy())
    region = Region((2, 15), (1, 3), (0, 2))
    packed, expected = await gather(source, blocks, region), await gather(host, blocks, region)
    assert np.array_equal(packed.memory, expected.memory)
    await scatter(packed, region, back, own)
    assert np.array_equal((await gather(back, own, region)).memory, expected.memory)
    server = await PoolServer.start(pool, "127.0.0.1", "first")
    link = await open_link(server.offer, source)
    span = SequenceSpan("one", (2, 15), (1, 3), blocks, [own], HASH)
    pieces = await stream_out(source, [span], [Peer(link, ours)])
    await stream_in(pool, own, "one", region, each(pieces), token_ids=b"")
    assert np.array_equal((await gather(pool, own, region)).memory, expected.memory)
    await link.aclose()
    await server.aclose()
