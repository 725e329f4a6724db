"""Token scheduler and cache stores in any order of events: what comes back out of a store is what went in."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from common.messages import pack_ids
from common.replica_messages import ReplicaItem, Replicate
from dejavu.params import SamplingParams
from services.cache_store.shelf import Shelf
from services.token_stage.replication import MAX_BATCH_TOKENS, Replication
from services.token_stage.sequence import MAX_SHOWN
from services.token_stage.sequence import Sequence as TokenSequence
from tests.unit.made_up_kv import BLOCK_SIZE, STORE_BLOCK_SIZE
from tests.unit.replication_world import NUM_STAGES, World, take_turn

FAULTS = ["epoch"] * 3 + ["router"] * 3 + ["lose", "join", "damage", "damage"]


@pytest.mark.seeds(40)
def test_what_comes_back_is_what_went_in(seed: int) -> None:
    simulate(seed)


@pytest.mark.seeds(20)
def test_what_a_store_keeps_that_was_taken_for_dead_is_right(seed: int) -> None:
    forsake(seed)


def forsake(seed: int) -> World:
    """Stores are taken for dead again and again, and go on reading."""
    return simulate(seed, ["forsake", "forsake", "epoch"] * 20, rate=0.03)


def test_an_answer_that_comes_twice_counts_once() -> None:
    """The second may come after the next batch's."""
    forsake(416)


@pytest.mark.seeds(20)
def test_what_is_lost_on_the_way_is_sent_again(seed: int) -> None:
    simulate(seed, ["epoch", "router", "join", "forsake"], loss=0.3)


def simulate(seed: int, faults: Sequence[str] = FAULTS, rate: float = 0.01, loss: float = 0.0) -> World:
    """One run; raises `AssertionError` where something is wrong, unprotected, stuck or leaked."""
    draws = random.Random(seed + 1000)
    # every other run with stores that have not enough room
    world = World(seed, num_blocks=24, num_store_blocks=40 if seed % 2 else 8)
    world.loss = loss
    to_submit = [(f"r{i}" + "s" * (i % 4 == 0), draws.randrange(1, 40), draws.randrange(1, 40)) for i in range(20)]
    faults = draws.sample(faults, len(faults) - 1)
    for turn in range(100_000):
        if to_submit and draws.random() < 0.1:
            world.submit(*to_submit.pop())
        if world.requests and draws.random() < 0.005:
            live = sorted(world.requests.keys() - world.ended)
            if live:
                world.cancel(draws.choice(live))
        pulling = [str(a[0]).split("/")[0] for kind, a in world.wire if kind == "pull"]
        if pulling and draws.random() < 0.02 and pulling[0] not in world.ended:
            world.cancel(pulling[0])
        if faults and draws.random() < rate:
            inject(world, faults.pop(), turn)
        world.start_steps()
        choices = ["step"] * bool(world.flying) + ["wire"] * bool(world.wire)
        # one that nobody waits for may take its time
        choices += [
            n for n, s in world.stores.items() if s.inbox and (n not in world.forsaken or draws.random() < 0.02)
        ]
        if choices:
            run(world, draws.choice(choices))
        elif world.away:
            world.come_back()
        elif not (to_submit or faults or world.is_owed or world.forsaken):
            break
        if world.away and draws.random() < 0.05:
            world.come_back()
        if world.forsaken and draws.random() < 0.03:
            world.find_store(draws.choice(sorted(world.forsaken)))
        world.check_blocks()
    check_end(world)
    return world


def check_end(world: World) -> None:
    """Everybody has ended, and every block is back."""
    assert world.ended == set(world.requests)
    assert world.token.table.allocator.num_free == 24
    assert world.token.table.num_running == world.token.table.num_waiting == 0
    for store in world.stores.values():
        store.shelf.sweep(1e9)
        assert store.shelf.kv_blocks()["free"] == store.shelf.kv_blocks()["total"]


def inject(world: World, fault: str, turn: int) -> None:
    if fault == "epoch":
        world.begin_epoch()
    elif fault == "router":
        world.lose_router()
    elif fault == "join":
        world.new_store(f"s{turn}")
    elif fault == "forsake" and world.stores.keys() - world.forsaken:
        world.forsake_store(world.draws.choice(sorted(world.stores.keys() - world.forsaken)))
    elif world.stores and fault == "damage":
        world.damage_store(world.draws.choice(sorted(world.stores)))
    elif world.stores and fault == "lose":
        world.lose_store(world.draws.choice(sorted(world.stores)))


def run(world: World, choice: str) -> None:
    if choice == "step":
        world.run_step()
    elif choice == "wire":
        world.deliver_one()
    else:
        world.run_store(choice)


def test_replicas_do_come_back() -> None:
    """The test above would say nothing if no sequence were ever restored."""
    world = World(7, num_blocks=64)
    world.submit("r", 30, 200 - 30)
    for turn in range(4000):
        world.start_steps()
        if world.flying and (turn % 3 == 0 or not (world.wire or any(s.inbox for s in world.stores.values()))):
            world.run_step()
        elif world.wire:
            world.deliver_one()
        else:
            for name in [name for name, store in world.stores.items() if store.inbox]:
                world.run_store(name)
        if turn in (200, 400):
            world.begin_epoch()
        if world.ended:
            break
    assert world.num_restored == 2 * NUM_STAGES
    assert world.token.table.costs.recoveries == 1
    assert world.token.table.costs.recomputed_tokens < 10


def test_a_damaged_or_foreign_replica_is_not_used() -> None:
    shelf = Shelf(4, STORE_BLOCK_SIZE)
    item = ReplicaItem("r/0", 0, 5, [0], pack_ids([1, 2, 3, 4, 5, 6]))
    assert shelf.make_room("p", item, 0.0) is not None
    shelf.commit(item, np.zeros((1, 5), dtype=np.uint64))
    assert shelf.locate("r/0", pack_ids([9, 2, 3]), 0.0) is None
    found = shelf.locate("r/0", pack_ids([1, 2, 7, 4]), 0.0)
    assert found is not None
    assert found[1] == 2
    gap = ReplicaItem("r/0", 7, 1, [0], pack_ids([7]))
    assert shelf.make_room("p", gap, 0.0) is None


def test_who_outlives_its_router_computes_nothing_again() -> None:
    """Another router asks for what the client lacks: the same sequence goes on, in its blocks."""
    world = World(3, num_blocks=64)
    for name in ("r", "t"):
        world.submit(name, 10, 30)
    while len(world.outputs["t"]) < 15:
        take_turn(world)
    world.lose_router()
    while world.flying:
        world.run_step()
    world.start_steps()
    assert not world.flying, "nobody asks for tokens"
    while world.away:
        world.come_back()
    while len(world.ended) < 2:
        take_turn(world)
    assert world.num_adopted == 2
    assert world.token.table.costs.recomputed_tokens == world.token.table.costs.recoveries == 0


def test_what_ends_while_a_store_is_away_is_forgotten_when_it_is_back() -> None:
    world = World(3, num_blocks=64)
    for name, num_tokens in (("r", 40), ("t", 200)):
        world.submit(name, 10, num_tokens)
    while len(world.outputs["r"]) < 15:
        take_turn(world)
    for name in sorted(world.stores):
        world.forsake_store(name)
    while "r" not in world.ended:
        take_turn(world)
    for name in sorted(world.forsaken):
        world.find_store(name)
    for _ in range(3):  # claimed, told, forgotten
        take_turn(world)
    kept = {key for store in world.stores.values() for key in store.shelf.replicas}
    assert kept == {"t/0"}


def test_a_sequence_that_has_gone_on_too_far_is_computed_again() -> None:
    """Only the last tokens are kept for the next router; and another request is not the same request."""
    world = World(3, num_blocks=256)
    world.submit("r", 10, 400)
    while len(world.outputs["r"]) < MAX_SHOWN + 40:
        take_turn(world)
    token, prompt, output = world.token, world.requests["r"], world.outputs["r"]
    params = SamplingParams(max_tokens=400, durability=world.durability["r"])
    assert token.admissions.adopt("r/0/x", prompt, output[:20], params) is None
    assert token.admissions.adopt("r/0/x", prompt, [*output[:-1], 99], params) is None
    assert token.admissions.adopt("r/0/x", prompt, output, SamplingParams(max_tokens=401)) is None
    assert token.admissions.adopt("r/0/x", prompt, output[:50], params) is not None


def test_a_store_that_dies_once_its_copy_is_here_is_not_missed() -> None:
    """The sequence goes on behind the copy; it was computed a second time beside that, and a token came twice."""
    world = World(7, num_blocks=64)
    world.submit("r", 30, 60)
    while len(world.outputs["r"]) < 20:
        take_turn(world)
    world.begin_epoch()
    while world.num_restored < NUM_STAGES:
        world.start_steps()
        for name, store in world.stores.items():
            if store.inbox:
                world.run_store(name)
        if world.wire:
            world.deliver_one()
    for name in list(world.stores):
        world.lose_store(name)
    while not world.ended:
        take_turn(world)
    assert world.token.table.costs.recomputed_tokens < 10


def test_streams_that_decode_do_not_wait_for_prompts() -> None:
    """What they draw while a store copies a prompt is lost if a stage dies then."""
    replication = Replication("token-0", 1, BLOCK_SIZE)
    replication.store_joined("store", was_there=False)
    replication.flush()
    replication.claimed("store", [])
    for name, num_computed in (("long", 10 * MAX_BATCH_TOKENS), ("prompt", 100), ("stream", 3)):
        sequence = TokenSequence(f"{name}/0/x", 0, SamplingParams(), 1, [7] * (num_computed + 1), 0)
        sequence.num_computed, sequence.blocks = num_computed, list(range(num_computed))
        replication.computed(sequence)
    ((_, batch),) = replication.flush()
    assert isinstance(batch, Replicate)
    assert [(item.key, item.num_tokens) for item in batch.items] == [("stream/0", 3), ("long/0", MAX_BATCH_TOKENS - 3)]
    replication.replicated("store", batch.batch, [])
    ((_, batch),) = replication.flush()
    assert isinstance(batch, Replicate)
    assert [(item.key, item.num_tokens) for item in batch.items] == [
        ("prompt/0", 100),
        ("long/0", MAX_BATCH_TOKENS - 100),
    ]


def test_what_a_batch_that_failed_has_left_is_forgotten_at_the_end() -> None:
    """A store that cannot read on keeps what it has; nobody told it that nobody wants that any more."""
    replication = Replication("token-0", 1, BLOCK_SIZE)
    replication.store_joined("store", was_there=False)
    replication.flush()
    replication.claimed("store", [])
    sequence = TokenSequence("r/0/x", 0, SamplingParams(), 1, [7] * 10, 0)
    sequence.blocks = list(range(10))
    for num_computed, failed in ((4, []), (8, ["r/0"])):
        sequence.num_computed = num_computed
        replication.computed(sequence)
        ((_, batch),) = replication.flush()
        assert isinstance(batch, Replicate)
        replication.replicated("store", batch.batch, failed)
    replication.ended(sequence, is_superseded=False)
    ((_, last),) = replication.flush()
    assert isinstance(last, Replicate)
    assert last.over == ["r/0"]
