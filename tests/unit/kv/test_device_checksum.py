"""The checksum computed on a device is the one that the host computes."""

from __future__ import annotations

import random

import pytest
import torch

from common.kv import device_checksum as module
from common.kv.checksum import SpanBinding, span_checksum
from common.kv.device_checksum import device_checksum
from common.kv.layout import PoolLayout
from common.kv.pool import KvPool
from tests.unit.kv.link_ends import random_pool
from tests.unit.kv.reference import layout, random_pair

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def on(device: str, host: KvPool) -> KvPool:
    if device == "cpu":
        return host
    pool = KvPool.create(host.layout, device)
    pool.arena.copy_(host.arena)
    return pool


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_hosts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_BYTES", 512)  # several parts
    generator = random.Random(0)
    for number in range(200):
        pair = random_pair(generator)
        host = random_pool(pair.source, seed=number)
        binding = SpanBinding("model", f"r{number}", pair.layer_range, pair.token_range, b"hash")
        expected = span_checksum(host.memory, host.layout, pair.source_blocks, binding, pair.head_range)
        pool = on(device, host)
        assert device_checksum(pool, pair.source_blocks, binding, pair.head_range) == expected
        pool.arena.bitwise_xor_(torch.tensor(0x80, dtype=torch.uint8, device=pool.device))
        if device == "cuda":
            torch.cuda.synchronize()
        assert device_checksum(pool, pair.source_blocks, binding, pair.head_range) != expected


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_also_of_quantised_elements(dtype: str) -> None:
    quantised: PoolLayout = layout(dtype=dtype, head_dim=6)
    host = random_pool(quantised)
    binding = SpanBinding("model", "r", (1, 3), (2, 13), b"")
    expected = span_checksum(host.memory, quantised, [7, 1, 2, 0], binding)
    assert device_checksum(host, [7, 1, 2, 0], binding) == expected


def test_what_the_pool_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens"):
        device_checksum(random_pool(layout()), [0], SpanBinding("model", "r", (0, 1), (0, 5), b""))
