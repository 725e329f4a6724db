"""A device that holds a few sequences of many computes what one that holds all would."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from common.kv.layout import PoolLayout
from common.kv.page_lock import PageLock
from common.kv.pool import KvPool
from common.kv.residency import Residency, Want, probe_s_per_byte

BLOCK = 4
NUM_HOST_BLOCKS = 96


def layout(num_blocks: int) -> PoolLayout:
    return PoolLayout(2, 4, num_blocks, BLOCK, 2, 8, "float32", "model")


@dataclass
class Held:
    """What the test knows of a sequence: its host blocks and a number per token."""

    blocks: list[int]
    values: list[float] = field(default_factory=list)


class World:
    """Writes tokens as a stage does: on the device, then through; checks whatever a step reads there."""

    def __init__(self, seed: int, num_device_blocks: int, *, keeps_idle: bool, device: str = "cpu") -> None:
        self.draws = random.Random(seed)
        self.host = KvPool.create(layout(NUM_HOST_BLOCKS))
        self.device = KvPool.create(layout(num_device_blocks), device)
        self.copier = ThreadPoolExecutor(1)
        self.lock = PageLock(self.host, self.device.device) if device == "cuda" else None
        self.residency = Residency(
            self.host,
            self.device,
            self.copier,
            keeps_idle=keeps_idle,
            host_seen=None if self.lock is None else self.lock.seen,
        )
        self.sequences: dict[int, Held] = {}
        self.free = list(range(NUM_HOST_BLOCKS))
        self.draws.shuffle(self.free)

    def close(self) -> None:
        self.copier.shutdown()
        if self.lock is not None:
            self.lock.close()
        self.host.close()
        self.device.close()

    def put(self, pool: KvPool, block: int, slot: int, value: float) -> None:
        for layer in range(2):
            for side, part in enumerate(pool.layer(layer)):
                part[block, slot] = value + 100 * layer + 1000 * side

    def hand_off(self, name: int, num_tokens: int) -> None:
        """A prompt's KV arrives in the host pool."""
        held = self.sequences[name] = Held([self.free.pop() for _ in range(-(-(num_tokens + 1) // BLOCK))])
        for token in range(num_tokens):
            held.values.append(float(self.draws.randrange(100)))
            self.put(self.host, held.blocks[token // BLOCK], token % BLOCK, held.values[-1])

    def want(self, name: int, num_new: int = 0) -> Want:
        held = self.sequences[name]
        return Want(name, held.blocks, len(held.values), len(held.values) + num_new)

    def step(self, names: list[int], upcoming: list[int]) -> None:
        for name in names:
            held = self.sequences[name]
            if len(held.values) == len(held.blocks) * BLOCK:
                held.blocks.append(self.free.pop())
        self.residency.enter([self.want(n, 1) for n in names], [self.want(n) for n in upcoming])
        for name in names:
            self.check(name)
            held, blocks = self.sequences[name], self.residency.blocks(name)
            token = len(held.values)
            held.values.append(float(self.draws.randrange(100)))
            self.put(self.device, blocks[token // BLOCK], token % BLOCK, held.values[-1])
        self.residency.write_through(
            (n, self.sequences[n].blocks, len(self.sequences[n].values) - 1, len(self.sequences[n].values))
            for n in names
        )
        for name in names:
            self.check(name)
            self.check_host(name)

    def check(self, name: int) -> None:
        self.check_pool(self.device, self.residency.blocks(name), self.sequences[name].values)

    def check_host(self, name: int) -> None:
        self.check_pool(self.host, self.sequences[name].blocks, self.sequences[name].values)

    def check_pool(self, pool: KvPool, blocks: list[int], values: list[float]) -> None:
        expected = torch.tensor(values)
        for layer in range(2):
            for side, part in enumerate(pool.layer(layer)):
                there = part[blocks].flatten(0, 1)[: len(values)].cpu()
                assert torch.equal(there, (expected + 100 * layer + 1000 * side)[:, None, None].expand_as(there))

    def end(self, name: int) -> None:
        self.residency.drop(name)
        self.free += self.sequences.pop(name).blocks
        self.draws.shuffle(self.free)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield request.param


@pytest.mark.parametrize("keeps_idle", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_steps_reads_what_was_written(seed: int, keeps_idle: bool, device: str) -> None:
    world = World(seed, num_device_blocks=20, keeps_idle=keeps_idle, device=device)
    draws, name = random.Random(seed), 0
    for _ in range(150):
        while len(world.sequences) < 8:
            world.hand_off(name, draws.randrange(1, 14))
            name += 1
        alive = list(world.sequences)
        draws.shuffle(alive)
        world.step(alive[:2], alive[2:4] if draws.random() < 0.7 else alive[1:3])
        assert world.residency.num_resident_blocks <= world.residency.peak_blocks <= 20
        for candidate in alive[:3]:
            if len(world.sequences[candidate].values) > 15 or draws.random() < 0.05:
                world.end(candidate)
    world.close()


def test_two_microbatches_are_on_the_device_and_no_more() -> None:
    world = World(0, num_device_blocks=64, keeps_idle=False)
    for name in range(6):
        world.hand_off(name, 11)
    for turn in range(9):
        first, then = turn % 3, (turn + 1) % 3
        world.step([2 * first, 2 * first + 1], [2 * then, 2 * then + 1])
    # each has grown to 14 tokens: 4 blocks; two microbatches of two
    assert world.residency.peak_blocks == 16
    # all but the very first step found its sequences there
    assert world.residency.waited_s < 1.0 and world.residency.swapped_in_bytes > 0
    world.close()


def test_what_fits_is_copied_once() -> None:
    world = World(0, num_device_blocks=64, keeps_idle=True)
    for name in range(6):
        world.hand_off(name, 8)
    for turn in range(12):
        world.step([turn % 6], [(turn + 1) % 6])
    assert world.residency.swapped_in_bytes == 6 * 8 * layout(1).bytes_per_token_layer * 2
    world.close()


def test_a_step_that_cannot_fit_is_an_error() -> None:
    world = World(0, num_device_blocks=4, keeps_idle=True)
    world.hand_off(0, 11)
    world.hand_off(1, 11)
    with pytest.raises(ValueError, match="do not fit 4 blocks"):
        world.residency.enter([world.want(0), world.want(1)], [])
    world.close()


def test_the_probe_measures_something() -> None:
    host, device = KvPool.create(layout(64)), KvPool.create(layout(16))
    assert 0 < probe_s_per_byte(host, device) < 1e-3
