"""A token scheduler, cache stores and whatever is on its way between them, over pools of made-up KV."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

from common.messages import Drawn, Step, pack_ids
from common.replica_messages import Claim, HeldReplica, Locate, Replicate, replica_key
from dejavu.params import SamplingParams
from services.token_stage.replication import Replication, ToStore
from services.token_stage.scheduler import TokenScheduler
from services.token_stage.sequence import Action, AskStore, Fail, Produce, PullReplica
from services.token_stage.table import PipelineShape
from tests.unit.made_up_kv import BLOCK_SIZE, STORE_BLOCK_SIZE, kv_of, next_token, slots
from tests.unit.made_up_store import Store

NUM_STAGES = 2


class World:
    """One colocated token pipeline, its stores, and whatever is on its way between them."""

    is_colocated = True

    def __init__(self, seed: int, num_blocks: int, num_store_blocks: int = 40) -> None:
        self.draws = random.Random(seed)
        self.num_store_blocks = num_store_blocks
        self.num_blocks = num_blocks
        self.epoch = 0
        self.pool: dict[int, int] = {}
        self.stores: dict[str, Store] = {name: Store(num_store_blocks) for name in "ab"}
        self.damaged: set[str] = set()
        self.forsaken: set[str] = set()
        """stores that the driver takes for dead"""
        self.void_batches: set[tuple[int, str, int]] = set()
        """(epoch, store, batch) that the driver waits for no more"""
        self.requests: dict[str, list[int]] = {}
        self.max_tokens: dict[str, int] = {}
        self.outputs: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        self.num_restored = 0
        self.refused: set[tuple[str, str]] = set()
        """what a store had no room for, as far as its answers have arrived: (store, key)"""
        self.answers: dict[tuple[int, str, int], list[str]] = {}
        """the keys that a batch (of an epoch, to a store) is about, until it has been answered"""
        self.durability: dict[str, str] = {}
        self.term = 0
        self.ours: dict[str, str] = {}
        """what the driver calls a sequence, which another router may have admitted"""
        self.away: list[str] = []
        """requests whose router died and whose clients have not come back yet"""
        self.num_adopted = 0
        self.now_s = 0.0
        self.loss = 0.0
        """this share of what needs an answer never arrives, nor do the answers"""
        self.begin_epoch()

    # ------------------------------------------------------------ faults

    def begin_epoch(self) -> None:
        """The pipeline died and runs again: its pool may hold anything, its messages are refused."""
        self.epoch += 1
        self.flying: deque[Step] = deque()
        self.wire: list[tuple[str, tuple[object, ...]]] = []
        self.table: dict[str, tuple[list[int], list[int]]] = {}
        self.refused.clear()
        for store in self.stores.values():
            store.dropped.clear()
        replication = Replication("token-0", self.epoch, BLOCK_SIZE, num_copies=1)
        for name in self.stores.keys() - self.forsaken:
            replication.store_joined(name, was_there=True)
        shape = PipelineShape(
            epoch=self.epoch,
            num_stages=NUM_STAGES,
            num_layers=1,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            eos_token_ids=(),
            chunk_tokens=16,
            is_colocated=self.is_colocated,
        )
        self.token = TokenScheduler(shape, replication)
        for name, prompt in self.requests.items():
            if name not in self.ended and name not in self.away:
                self.admit(name, prompt)

    def lose_router(self) -> None:
        """It had not passed on the last tokens, perhaps not even the end."""
        self.term += 1
        for name in self.requests:
            was_finished = name in self.ended and len(self.outputs[name]) == self.max_tokens[name]
            if name in self.away or (name in self.ended and not was_finished):
                continue
            num_lost = self.draws.randrange(4)
            if was_finished and not num_lost:
                continue
            self.outputs[name] = self.outputs[name][: len(self.outputs[name]) - num_lost]
            self.ended.discard(name)
            self.away.append(name)
            self.token.admissions.orphan(self.ours[name])

    def come_back(self) -> None:
        name = self.away.pop(self.draws.randrange(len(self.away)))
        self.admit(name, self.requests[name])

    def lose_store(self, name: str) -> None:
        del self.stores[name]
        self.forsaken.discard(name)
        self.wire = [(kind, a) for kind, a in self.wire if name not in a]
        self.carry_out(self.token.intake.store_lost(name))

    def forsake_store(self, name: str) -> None:
        """It is taken for dead, and lives: what it has been told to read it may read, whoever the blocks belong to."""
        self.forsaken.add(name)
        self.void_batches |= {key for key in self.answers if key[1] == name}
        self.carry_out(self.token.intake.store_lost(name))

    def find_store(self, name: str) -> None:
        """It has noticed, and is seen again."""
        self.forsaken.discard(name)
        shelf = self.stores[name].shelf
        shelf.standing = (shelf.standing or 0) + 1
        self.token.table.replication.store_joined(name, was_there=False)

    def damage_store(self, name: str) -> None:
        """All that it has, not what it gets from now on."""
        self.damaged.add(name)
        self.stores[name].pool = {position: value + 1 for position, value in self.stores[name].pool.items()}

    def new_store(self, name: str) -> None:
        self.stores[name] = Store(self.num_store_blocks)
        self.token.table.replication.store_joined(name, was_there=False)

    # ------------------------------------------------------------ requests

    def submit(self, name: str, num_prompt: int, max_tokens: int) -> None:
        self.requests[name] = [self.draws.randrange(1, 90) for _ in range(num_prompt)]
        self.max_tokens[name] = max_tokens
        self.outputs[name] = []
        self.admit(name, self.requests[name])

    def admit(self, name: str, prompt: list[int]) -> None:
        durability = self.durability.setdefault(name, self.draws.choice(["async", "lag:3", "sync"]))
        is_strict = name.endswith("s")
        params = SamplingParams(max_tokens=self.max_tokens[name], durability=durability, durability_strict=is_strict)
        sequence_id = f"{name}/0/{self.term}"
        adopted = self.token.admissions.adopt(sequence_id, prompt, self.outputs[name], params)
        if adopted is None:
            self.ours[name] = sequence_id
            self.carry_out(self.token.admissions.admit(sequence_id, 0, prompt, self.outputs[name], params))
            return
        self.ours[name], actions = adopted
        self.num_adopted += 1
        self.carry_out(actions, were_shown=True)

    def cancel(self, name: str) -> None:
        self.ended.add(name)
        if name in self.away:
            self.away.remove(name)
        self.carry_out(self.token.admissions.cancel(self.ours[name]))

    def carry_out(self, actions: Iterable[Action], *, were_shown: bool = False) -> None:
        actions = list(actions)
        ending = {action.sequence_id for action in actions if isinstance(action, Produce) and action.finish_reason}
        for action in actions:
            match action:
                case Produce(sequence_id, index, drawn, reason):
                    name = sequence_id.split("/")[0]
                    tokens = self.requests[name] + self.outputs[name]
                    assert index == len(self.outputs[name])
                    assert drawn.token_id == next_token(tokens)
                    is_new = sequence_id not in ending and not were_shown
                    if is_new and self.durability[name] != "async":
                        self.check_safe(name, tokens, 3 if self.durability[name] == "lag:3" else 0)
                    if is_new and name.endswith("s"):
                        self.check_strict(name, tokens)
                    self.outputs[name].append(drawn.token_id)
                    if reason is not None:
                        self.ended.add(name)
                case AskStore(sequence_id, store):
                    sequence = self.token.table.sequences.get(sequence_id)
                    assert sequence is not None
                    self.to_store(self.token.table.replication.locate(store, sequence))
                case PullReplica(sequence_id):
                    pulling = self.token.table.sequences.get(sequence_id)
                    assert pulling is not None
                    for _ in range(NUM_STAGES):
                        self.wire.append(("pull", (sequence_id, list(pulling.blocks))))
                case Fail():
                    raise AssertionError(action)

    def check_strict(self, name: str, tokens: list[int]) -> None:
        """Nobody but a store can let a strict request go on, whatever became of the stores."""
        assert self.token.table.replication.num_stores
        if self.durability[name] != "async":
            assert self.is_kept(name, tokens, 3)

    def check_safe(self, name: str, tokens: list[int], max_lag: int) -> None:
        """A token after `tokens` is delivered: a store must have nearly all KV before it, unless one has no room."""
        is_refused = any((store, f"{name}/0") in self.refused for store in self.stores)
        has_store = self.token.table.replication.num_stores > 0
        assert self.is_kept(name, tokens, max_lag) or is_refused or not has_store

    def is_kept(self, name: str, tokens: list[int], max_lag: int) -> bool:
        """A store has so much, or had it before it refused more, which the driver cannot know yet."""
        key = f"{name}/0"
        found = [store.shelf.locate(key, pack_ids(tokens), 0.0) for store in self.stores.values()]
        kept = [each[1] for each in found if each is not None]
        had = [store.dropped.get(key, 0) for store in self.stores.values()]
        return max([*kept, *had], default=0) >= len(tokens) - max_lag

    # ------------------------------------------------------------ the token pipeline

    def start_steps(self) -> None:
        while (step := self.token.next_step()) is not None:
            self.flying.append(step)
        self.now_s += 0.1
        if self.draws.random() < 0.05:
            self.carry_out(self.token.patience.ask_again())
        for message in self.token.table.replication.flush(self.now_s):
            self.to_store(message)

    def run_step(self) -> None:
        step = self.flying.popleft()
        for sequence_id in step.closes:
            del self.table[sequence_id]
        for opened in step.opens:
            tokens = list(memoryview(opened.token_ids).cast("i"))
            self.table[opened.sequence_id] = (tokens, list(opened.blocks))
        drawn: list[Drawn] = []
        for chunk in step.chunks:
            lent = self.token.table.sequences.get(chunk.sequence_id)
            assert lent is not None and lent.blocks, "blocks were given away while a step used them"
            tokens, blocks = self.table[chunk.sequence_id]
            blocks += chunk.new_blocks
            if chunk.appended is not None and chunk.start == len(tokens):
                tokens.append(chunk.appended)
            start, end = chunk.start, chunk.start + chunk.num_tokens
            places, values = slots(blocks, 0, end, BLOCK_SIZE), kv_of(tokens, end)
            assert [self.pool[place] for place in places[:start]] == values[:start]
            self.pool.update(zip(places[start:], values[start:], strict=True))
            if chunk.draws:
                drawn.append(Drawn(next_token(tokens)))
                tokens.append(drawn[-1].token_id)
        self.carry_out(self.token.step_done(step.step, drawn))

    def pull(self, sequence_id: str) -> None:
        sequence = self.token.table.sequences.get(sequence_id)
        assert sequence is not None, "blocks were given away while a stage was pulling"
        store = self.stores.get(sequence.source)
        held = sequence.replica
        is_intact = store is not None and held is not None
        if store is not None and held is not None:
            count = held.num_tokens
            values = [store.pool[place] for place in slots(held.blocks, 0, count, STORE_BLOCK_SIZE)]
            is_intact = values == kv_of(sequence.tokens, count)
            # of one that was cancelled meanwhile the store keeps nothing
            assert is_intact or sequence.is_leaving or sequence.source in self.damaged
            self.pool.update(zip(slots(sequence.blocks, 0, count, BLOCK_SIZE), values, strict=True))
            self.num_restored += is_intact
        self.carry_out(self.token.intake.pulled(sequence_id, sequence.attempt, is_intact))

    # ------------------------------------------------------------ the stores

    def to_store(self, message: ToStore) -> None:
        name, about = message
        if name in self.stores.keys() - self.forsaken:
            if self.draws.random() >= self.loss:
                self.stores[name].inbox.append(about)
            if isinstance(about, Replicate):
                self.answers[about.epoch, name, about.batch] = [item.key for item in about.items]

    def run_store(self, name: str) -> None:
        store = self.stores[name]
        message = store.inbox.popleft()
        if isinstance(message, Claim):
            keys = store.shelf.claim("token-0", message.epoch, message.batch, 0.0)
            if keys is not None:
                self._answer("claimed", (message.epoch, name, keys))
        elif store.shelf.accepts("token-0", message.epoch):
            self._serve(name, store, message)

    def _serve(self, name: str, store: Store, message: Replicate | Locate) -> None:
        match message:
            case Replicate(pipeline, epoch, batch, items, over):
                if store.shelf.begin(pipeline, epoch, batch, items):
                    for key in over:
                        store.shelf.ended(pipeline, key)
                    store.answer = (epoch, batch, [item.key for item in items if not store.keep(item, self.pool)])
                if store.answer[:2] == (epoch, batch):
                    self._answer("replicated", (epoch, name, batch, store.answer[2]))
            case Locate(_, epoch, sequence_id, attempt, ids, _):
                found = store.shelf.locate(replica_key(sequence_id), ids, 0.0)
                held = None if found is None else HeldReplica(found[1], list(found[0].blocks), [0] * NUM_STAGES)
                self._answer("located", (epoch, sequence_id, attempt, name, held))

    def _answer(self, kind: str, arguments: tuple[object, ...]) -> None:
        if self.draws.random() >= self.loss:
            self.wire.append((kind, arguments))

    # ------------------------------------------------------------ who touches what

    def touches(self) -> list[tuple[str, list[int]]]:
        """Blocks that somebody is about to read or write, with the key of the sequence that they were lent to."""
        items = [
            item
            for name, store in self.stores.items()
            for message in store.inbox
            if isinstance(message, Replicate)
            and store.shelf.accepts("token-0", message.epoch)
            and (message.epoch, name, message.batch) not in self.void_batches
            and (message.epoch, message.batch) > store.answer[:2]
            for item in message.items
        ]
        pulls = [a for kind, a in self.wire if kind == "pull"]
        # the sequence and its blocks
        return [(i.key, i.blocks) for i in items] + [(replica_key(str(a[0])), a[1]) for a in pulls]  # type: ignore[misc]

    @property
    def is_owed(self) -> bool:
        """Whether a store, or somebody on the way to it, owes the driver an answer."""
        owing = any(store.asked is not None for store in self.token.table.replication._stores.values())
        return owing or any(sequence.is_asking for sequence in self.token.table.sequences.values())

    def check_blocks(self) -> None:
        """Nobody else has them meanwhile."""
        self.token.table.allocator.check()
        lent: dict[int, str] = {}
        touches = self.touches()
        for sequence in self.token.table.sequences.values() if touches else ():
            lent |= dict.fromkeys(sequence.blocks, replica_key(sequence.sequence_id))
        for key, blocks in touches:
            assert all(lent.get(block, key) == key for block in blocks), f"blocks of {key} were given away too early"

    # ------------------------------------------------------------ delivery

    def deliver_one(self) -> None:
        self.deliver(*self.wire.pop(self.draws.randrange(len(self.wire))))

    def deliver(self, kind: str, arguments: tuple[object, ...]) -> None:
        if kind == "pull":
            self.pull(str(arguments[0]))
            return
        epoch, *rest = arguments
        if epoch != self.epoch:
            return
        if kind == "claimed":
            self.carry_out(self.token.intake.store_claimed(*rest))  # type: ignore[arg-type]
            return
        if kind == "replicated":
            name, batch, failed = rest
            keys = self.answers.pop((epoch, name, batch), None)  # type: ignore[arg-type]
            if keys is not None and (epoch, name, batch) not in self.void_batches:
                self.refused -= {(str(name), key) for key in keys}
                self.refused |= {(str(name), key) for key in failed}  # type: ignore[attr-defined]
            if (answering := self.stores.get(str(name))) is not None:
                for key in failed:  # type: ignore[attr-defined]
                    answering.dropped.pop(key, None)
            self.carry_out(self.token.intake.replicated(*rest))  # type: ignore[arg-type]
            return
        sequence_id, attempt, store, held = rest
        self.carry_out(self.token.intake.located(sequence_id, attempt, store, held))  # type: ignore[arg-type]


def take_turn(world: World) -> None:
    """Everything that can happen happens once; stores keep up."""
    world.start_steps()
    for name, store in world.stores.items():
        while store.inbox:
            world.run_store(name)
    while world.wire:
        world.deliver_one()
    if world.flying:
        world.run_step()
