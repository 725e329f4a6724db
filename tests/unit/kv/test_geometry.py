from __future__ import annotations

import random
import time

import numpy as np
import pytest

from common.kv.checksum import SpanBinding, span_checksum
from common.kv.copies import copy_pieces, gather, scatter
from common.kv.geometry import Int64, plan_copies, route
from common.kv.layout import PoolLayout
from tests.unit.kv.reference import ReferenceCache, layout, random_pair, table


def test_thousands_of_pairs_carry_exactly_the_bytes() -> None:
    for seed in range(3000):
        pair = random_pair(random.Random(seed))
        cache = ReferenceCache(pair.source, pair.num_tokens, seed)
        source = cache.written_to(pair.source, pair.source_blocks)
        destination = np.full(pair.destination.total_bytes, 0xAA, dtype=np.uint8)
        plan = plan_copies(
            pair.source, pair.source_blocks, pair.destination, pair.destination_blocks, pair.token_range,
            pair.layer_range, pair.head_range,
        )  # fmt: skip
        copy_pieces(plan, source, destination)
        expected = cache.written_to(
            pair.destination,
            pair.destination_blocks,
            pair.token_range,
            pair.layer_range,
            pair.head_range,
            0xAA,
        )
        assert np.array_equal(destination, expected), f"seed {seed}"
        assert_minimal(plan.source_offset, plan.destination_offset, plan.num_bytes)
        binding = SpanBinding("model", "sequence", pair.layer_range, pair.token_range, b"hash")
        sent = span_checksum(source, pair.source, pair.source_blocks, binding, pair.head_range)
        got = span_checksum(destination, pair.destination, pair.destination_blocks, binding, pair.head_range)
        assert sent == got, f"seed {seed}"


def assert_minimal(source: Int64, destination: Int64, sizes: Int64) -> None:
    joins = (source[1:] == source[:-1] + sizes[:-1]) & (destination[1:] == destination[:-1] + sizes[:-1])
    assert not joins.any()


def test_runs_become_one_piece_per_plane_and_whole_pools_one_piece() -> None:
    ours, theirs = layout(num_blocks=8, block_size=4), layout(num_blocks=32, block_size=2)
    plan = plan_copies(ours, [2, 3, 4], theirs, range(10, 16), (0, 12), (0, 4))
    assert len(plan) == 2 * 4 and set(plan.num_bytes.tolist()) == {12 * ours.slot_bytes}
    same = plan_copies(ours, range(8), ours, range(8), (0, 32), (0, 4))
    assert len(same) == 1 and same.total_bytes == ours.total_bytes


def test_a_long_hand_off_is_planned_within_two_milliseconds() -> None:
    ours = layout(last_layer=32, num_blocks=200, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    shuffled = table(random.Random(1), 200, 128)
    took_s = []
    for _ in range(10):
        started_s = time.perf_counter()
        plan = plan_copies(ours, shuffled, ours, range(128), (0, 2048), (0, 32))
        took_s.append(time.perf_counter() - started_s)
    assert plan.total_bytes == 2048 * 32 * ours.bytes_per_token_layer
    assert min(took_s) < 2e-3


def test_gathered_pieces_scatter_back() -> None:
    generator = np.random.default_rng(0)
    source = generator.integers(0, 256, 1 << 20, dtype=np.uint8)
    ours = layout(num_blocks=64, num_kv_heads=4)
    half = layout(num_blocks=64, num_kv_heads=2, first_head=2)
    plan = plan_copies(ours, range(64), half, range(63, -1, -1), (1, 255), (0, 4))
    straight = np.zeros(half.total_bytes, dtype=np.uint8)
    copy_pieces(plan, source, straight)
    scattered = np.zeros_like(straight)
    gathered = gather(source, plan.source_offset, plan.num_bytes)
    scatter(gathered, plan.destination_offset, plan.num_bytes, scattered)
    assert np.array_equal(straight, scattered) and straight.any()


@pytest.mark.parametrize(
    ("blocks", "tokens", "layers", "heads", "message"),
    [
        ([0, 1], (0, 9), (0, 4), None, "tokens 0:9"),
        ([0, 1], (3, 3), (0, 4), None, "tokens 3:3"),
        ([0, 1], (0, 8), (0, 5), None, "layers 0:5"),
        ([0, 1], (0, 8), (0, 4), (0, 3), "heads 0:3"),
        ([0, 8], (0, 8), (0, 4), None, "block ids 0..8"),
        ([-1, 0], (0, 8), (0, 4), None, "block ids -1..0"),
    ],
)
def test_what_a_pool_does_not_hold_is_refused(
    blocks: list[int],
    tokens: tuple[int, int],
    layers: tuple[int, int],
    heads: tuple[int, int] | None,
    message: str,
) -> None:
    ours = layout(num_blocks=8, block_size=4)
    with pytest.raises(ValueError, match=message):
        plan_copies(layout(num_blocks=8, block_size=4), [0, 1, 2], ours, blocks, tokens, layers, heads)


def test_pools_of_different_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes here"):
        plan_copies(layout(), [0], layout(head_dim=16), [0], (0, 1), (0, 1))


def test_route_splits_layers_over_stages() -> None:
    stages = [(0, 3), (3, 4), (4, 10)]
    assert route(stages, (2, 6)) == [(0, (2, 3)), (1, (3, 4)), (2, (4, 6))]
    assert route(stages, (4, 5)) == [(2, (4, 5))]
    for wrong in [(8, 11), (10, 12)]:
        with pytest.raises(ValueError, match="do not own"):
            route(stages, wrong)
    with pytest.raises(ValueError, match="do not own"):
        route([(0, 3), (4, 6)], (2, 5))


def test_checksum_sees_damage_mix_ups_and_other_claims() -> None:
    ours: PoolLayout = layout(num_blocks=8, block_size=4)
    cache = ReferenceCache(ours, 32, 5)
    blocks = [3, 1, 6, 0]
    memory = cache.written_to(ours, blocks, (0, 16))
    claim = SpanBinding("model", "sequence", (1, 3), (2, 15), b"hash")
    good = span_checksum(memory, ours, blocks, claim)
    generator = random.Random(3)
    for _ in range(200):
        damaged = memory.copy()
        token, plane = generator.randrange(2, 15), generator.randrange(2, 6)
        slot = blocks[token // 4] * 4 + token % 4
        at = plane * ours.plane_bytes + slot * ours.slot_bytes + generator.randrange(ours.slot_bytes)
        damaged[at] ^= 1 << generator.randrange(8)
        assert span_checksum(damaged, ours, blocks, claim) != good
    assert span_checksum(memory, ours, [1, 3, 6, 0], claim) != good
    for other in [
        SpanBinding("other", "sequence", (1, 3), (2, 15), b"hash"),
        SpanBinding("model", "other", (1, 3), (2, 15), b"hash"),
        SpanBinding("model", "sequence", (0, 2), (2, 15), b"hash"),
        SpanBinding("model", "sequence", (1, 3), (1, 14), b"hash"),
        SpanBinding("model", "sequence", (1, 3), (2, 15), b"other"),
    ]:
        assert span_checksum(memory, ours, blocks, other) != good
