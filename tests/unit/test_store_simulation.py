"""A cache store and its disk, which is full, slow, fails, rots and loses power at any moment: what comes back is what
was kept, what was on disk is found again, and neither memory nor files stay behind."""

from __future__ import annotations

import pytest

from common.kv.blocks import BlockAllocator
from common.replica_messages import Claimed, Located, Replicated, replica_key
from dejavu.params import SamplingParams
from services.token_stage.replication import Replication
from services.token_stage.sequence import Phase, Sequence
from tests.unit.store_world import BLOCK_SIZE, NUM_STAGE_BLOCKS, PIPELINE, STORE, STORE_BLOCK_SIZE, StoreWorld
from tests.unit.virtual_time import run_virtually

MAX_SEQUENCES = 6
MAX_TOKENS = 90
FAULT_S = 12.0
"""The longest that a fault of the disk lasts."""


class Driver:
    """A token driver's replication, and sequences that grow by themselves."""

    def __init__(self, world: StoreWorld) -> None:
        self.world = world
        self.draws = world.draws
        self.sequences: dict[str, Sequence] = {}
        self.num_begun = 0
        self.is_dead = False
        """... and back when the store is"""
        self.begin_epoch()

    # ------------------------------------------------------------ events

    def begin_epoch(self) -> None:
        """The pipeline died and runs again: every live sequence asks for its copy."""
        world = self.world
        world.epoch += 1
        self.allocator = BlockAllocator(NUM_STAGE_BLOCKS)
        self.replication = Replication(PIPELINE, world.epoch, BLOCK_SIZE)
        self.asking: dict[str, Sequence] = {}
        old, self.sequences = self.sequences, {}
        for sequence in old.values():
            self.admit(sequence.sequence_id, sequence.tokens)
        self.is_joined = world.is_served
        if world.life is not None and self.is_joined:
            world.life.records.put_nowait(world.record())
            self.replication.store_joined(STORE, was_there=True)
        else:
            self.located(list(self.asking), None)

    def admit(self, sequence_id: str, tokens: list[int]) -> None:
        blocks = self.allocator.allocate(sequence_id, self._num_blocks(MAX_TOKENS), self._num_blocks(MAX_TOKENS))
        assert blocks is not None
        sequence = Sequence(sequence_id, 0, SamplingParams(), 1, list(tokens), 0, Phase.DECODING, 1, blocks)
        key = replica_key(sequence_id)
        self.world.texts.setdefault(key, []).append(sequence.tokens)
        self.sequences[key] = self.asking[key] = sequence

    def begin(self) -> None:
        self.num_begun += 1
        self.admit(f"r{self.num_begun}/0/t", self._ids(self.draws.randint(2, 40)))
        self.located([f"r{self.num_begun}/0"], None)  # nobody can have a copy

    def begin_again(self, key: str) -> None:
        """Another text, or the same one up to some token, takes the place of a sequence."""
        old = self.sequences[key]
        self.end(key, is_superseded=True)
        self.num_begun += 1
        num_same = self.draws.randrange(len(old.tokens))
        tokens = old.tokens[:num_same] + self._ids(self.draws.randint(2, 20))
        self.admit(f"{key}/t{self.num_begun}", tokens[:MAX_TOKENS])
        if not self.ask([key]):
            self.located([key], None)

    def grow(self, key: str) -> None:
        sequence = self.sequences[key]
        count = min(self.draws.choice([1, 1, 1, 2, 5, 40]), MAX_TOKENS - len(sequence.tokens))
        sequence.tokens += self._ids(count)
        if key not in self.asking:
            self._compute(sequence)

    def end(self, key: str, *, is_superseded: bool = False) -> None:
        sequence = self.sequences.pop(key)
        self.asking.pop(key, None)
        sequence.phase = Phase.ENDED
        self.replication.ended(sequence, is_superseded=is_superseded)
        self._release([sequence])

    # ------------------------------------------------------------ messages

    def work(self) -> None:
        """Everything that has arrived is dealt with, and everything that is new is sent."""
        world = self.world
        if self.is_dead and world.is_served:
            self.is_dead = False
            world.lost.clear()
            self.begin_epoch()
        while world.lost:
            self._release(self.replication.store_lost(world.lost.pop()))
            self.located(list(self.asking), None)
            self.is_joined = False
        if world.is_served and not self.is_joined:
            self.is_joined = True
            self.replication.store_joined(STORE, was_there=False)
        while world.from_store:
            message = world.from_store.popleft()
            if not world.deliver(message):
                continue
            if isinstance(message, Claimed):
                self.replication.claimed(message.name, message.keys)
                self.ask(list(self.asking))
            elif isinstance(message, Replicated):
                self._release(self.replication.replicated(message.store, message.batch, message.failed))
            elif isinstance(message, Located):
                self.located([replica_key(message.sequence_id)], message)
        world.to_store.extend(message for _, message in self.replication.flush())

    def ask(self, keys: list[str]) -> bool:
        """Whether there is a store to ask."""
        holder = ""
        for key in keys:
            sequence = self.asking[key]
            holder = self.replication.holder(sequence, is_continued=True) or ""
            if holder:
                self.world.to_store.append(self.replication.locate(holder, sequence)[1])
        return bool(holder)

    def located(self, keys: list[str], located: Located | None) -> None:
        for key in keys:
            sequence = self.asking.get(key)
            if sequence is None or (located is not None and located.sequence_id != sequence.sequence_id):
                continue
            del self.asking[key]
            held = None if located is None else located.held
            if held is not None:
                self.world.check_held(key, sequence.tokens, held)
                sequence.num_computed = min(held.num_tokens, len(sequence.tokens) - 1)
                self.world.compute(sequence.tokens[: sequence.num_computed], sequence.blocks, 0)
                self.replication.restored(sequence, STORE)
            self._compute(sequence)

    def _compute(self, sequence: Sequence) -> None:
        count = len(sequence.tokens) - 1
        if count > sequence.num_computed:
            self.world.compute(sequence.tokens[:count], sequence.blocks, sequence.num_computed)
            sequence.num_computed = count
            self.replication.computed(sequence)

    def _release(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.phase is Phase.ENDED and not sequence.num_reads and sequence.blocks:
                self.allocator.release(sequence.sequence_id)
                sequence.blocks = []

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // BLOCK_SIZE)

    def _ids(self, count: int) -> list[int]:
        return [self.draws.randrange(1, 90) for _ in range(count)]


def inject(world: StoreWorld, driver: Driver, fault: str) -> None:
    """Most of them end by themselves, or by `heal`."""
    disk, draws = world.disk, world.draws
    match fault:
        case "kill" | "power":
            world.lose_store(power_is_cut=fault == "power")
        case "everything":
            world.lose_store(power_is_cut=draws.random() < 0.7)
            driver.is_dead = True
        case "cut":
            world.cuts_power = draws.random() < 0.7
            disk.cut_in = draws.choice([draws.randrange(20), draws.randrange(300)])
        case "epoch":
            driver.begin_epoch()
        case "fail":
            disk.failure_rate = draws.choice([0.02, 0.3])
        case "hang":
            disk.hang_rate = draws.choice([0.05, 0.5])
        case "full":
            disk.max_bytes = disk.used_bytes + draws.randrange(5000)
        case "rot":
            for _ in range(draws.randrange(1, 6)):
                disk.rot()
            world.lose_store(power_is_cut=False)  # before it is noticed
            driver.is_dead = True
        case "links":
            world.link_failure_rate = 0.2
        case "lease" if world.life is not None:
            world.life.standing += 1


FAULTS = [
    "kill", "power", "power", "everything", "everything", "everything", "cut", "cut", "cut", "epoch", "epoch", "stop",
    "stop", "fail", "hang", "hang", "full", "rot", "rot", "links", "lease",
]  # fmt: skip


def act(world: StoreWorld, driver: Driver) -> None:
    """One of the sequences does something, or a new one begins."""
    draws, keys = world.draws, sorted(driver.sequences)
    what = draws.choice(["begin", *["grow"] * 12, "end", "again"])
    if what == "begin" and len(keys) < MAX_SEQUENCES:
        driver.begin()
    elif keys:
        key = draws.choice(keys)
        if what == "end" and len(keys) > 2:
            driver.end(key)
        elif what == "again" and draws.random() < 0.7:
            driver.begin_again(key)
        else:
            driver.grow(key)


async def _simulate(world: StoreWorld) -> None:
    draws = world.draws
    world.starts_at_s = world.now_s
    driver = Driver(world)
    faults = [draws.choice(FAULTS) for _ in range(draws.randrange(8))]
    heals_at_s = 0.0
    for _ in range(300):
        await world.turn(draws.choice([0.001, 0.001, 0.01, 0.1, 0.5, 2.0]))
        driver.work()
        act(world, driver)
        if faults and draws.random() < 0.03:
            fault = faults.pop()
            if fault == "stop" and world.is_served:
                await world.stop_store()
            else:
                inject(world, driver, fault)
            heals_at_s = world.now_s + draws.uniform(1.0, FAULT_S)
        if world.now_s > heals_at_s:
            world.heal()
    world.heal()
    await _settle(world, driver)
    await _clear(world, driver)


async def _settle(world: StoreWorld, driver: Driver) -> None:
    """In the end every sequence has its copy, as far as there is room, and every copy is on disk."""
    end_s = world.now_s + 60.0
    while unfinished := _unfinished(world, driver):
        assert world.now_s < end_s, unfinished
        await world.turn(0.2)
        driver.work()
        for key in driver.sequences:  # a refusal is remembered for some batches
            if world.draws.random() < 0.5 and len(driver.sequences[key].tokens) < MAX_TOKENS:
                driver.grow(key)


def _unfinished(world: StoreWorld, driver: Driver) -> list[str]:
    if not world.is_served or world.life is None:
        return ["no store"]
    shelf = world.life.store._shelf
    todo = [f"{key} waits for its copy" for key in driver.asking]
    num_needed = sum(-(-len(sequence.tokens) // STORE_BLOCK_SIZE) for sequence in driver.sequences.values())
    has_room = num_needed <= shelf.kv_blocks()["total"]
    if has_room and driver.replication.lag_tokens() > 50:
        todo.append("nothing is copied")
    if world.life.store._disk is not None and world.disk_bytes == world.disk.max_bytes == 1 << 20:
        behind = [key for key, each in shelf.replicas.items() if each.num_on_disk < each.num_tokens]
        todo += [f"{key} is not on disk" for key in behind]
    return todo


async def _clear(world: StoreWorld, driver: Driver) -> None:
    """Once nobody wants anything, nothing is left."""
    for key in sorted(driver.sequences):
        driver.end(key)
    driver.begin_epoch()
    for _ in range(90):
        await world.turn(1.0)
        driver.work()
    assert driver.allocator.num_free == NUM_STAGE_BLOCKS
    life = world.life
    assert life is not None
    assert not life.store._shelf.replicas
    blocks = life.store._shelf.kv_blocks()
    assert blocks["free"] == blocks["total"]
    if life.store._disk is not None:
        # what failed to be deleted before it had its name is deleted when the store is started next
        parts = {name for name in world.disk.names if name.endswith(".part")} if world.disk.num_failures else set()
        assert world.disk.names.keys() - parts == {"lock"}, "files are left behind"
        assert world.disk.num_open == 1, "files are left open"
    await world.stop_store()


def simulate(seed: int) -> StoreWorld:
    """One run; raises `AssertionError` where something comes back wrong, is lost, stuck or left behind."""
    worlds: list[StoreWorld] = []

    async def main() -> None:
        worlds.append(StoreWorld(seed, patch))
        try:
            await _simulate(worlds[0])
        finally:
            worlds[0].close()

    with pytest.MonkeyPatch.context() as patch:
        run_virtually(main())
    return worlds[0]


@pytest.mark.seeds(6)
def test_what_comes_back_is_what_was_kept(seed: int) -> None:
    simulate(seed)


@pytest.mark.parametrize("seed", [198, 396])
def test_a_directory_that_cannot_be_listed_ends_no_store(seed: int) -> None:
    """It is served without its disk."""
    simulate(seed)


def test_much_is_found_and_much_comes_back() -> None:
    """The runs would say little if nothing came back from the disk, or nothing was ever torn."""
    worlds = [simulate(seed) for seed in range(100, 110)]
    assert sum(world.num_found for world in worlds) > 4
    assert sum(world.num_held for world in worlds) > 4
