"""A prompt pipeline dies in the middle of prompts: what had arrived comes back out of a store, on both sides. What it
had begun to write may land later, as long as nobody has fenced it off."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from common.handoff_messages import Handoff
from common.kv.fence import Fence
from common.messages import Drawn, Prefill, Step, pack_ids
from services.prompt_stage.scheduler import Action as PromptAction
from services.prompt_stage.scheduler import DeliverFirst, NeverStarted, PromptScheduler, PullHeld
from services.token_stage.sequence import Action, Grant, StopPrefill
from tests.unit.made_up_kv import BLOCK_SIZE, STORE_BLOCK_SIZE, kv_of, next_token, slots
from tests.unit.replication_world import NUM_STAGES, World

NUM_PROMPT_BLOCKS = 40
CHUNK_TOKENS = 16
NUM_PROMPT_STAGES = 2
TO_PROMPTS = ("prefill", "cancel_prefill", "prompt_pull", "let_go")
OWN_KINDS = (*TO_PROMPTS, "kv_confirmed", "handoff_ended", "first_token", "fence_off", "fenced_off")


@dataclass(frozen=True)
class LateWrite:
    """Something that a writer which lives on, unheard, may yet put into a token stage's pool. The stage can refuse it
    once it was told to, unless the writer has the memory (`is_direct`)."""

    stage: int
    authority: dict[str, int]
    prefill: Prefill
    span: tuple[int, int]
    is_direct: bool


class TwoPipelines(World):
    """A prompt pipeline feeds the token pipeline; both can die."""

    is_colocated = False

    def __init__(self, seed: int, num_blocks: int) -> None:
        self.prompt_epoch = 0
        self.late: list[LateWrite] = []
        self.fencing: list[tuple[int, dict[str, int]]] = []
        """what stages were asked to fence off and have not"""
        self.links = 0
        self.loses_writes = False
        """links break now and then"""
        self.unconfirmed: dict[tuple[str, int], dict[str, int]] = {}
        self.num_late = 0
        self.num_prompt_tokens = 0
        """computed by all prompt pipelines together"""
        self.begin_prompt_epoch()
        super().__init__(seed, num_blocks)

    def begin_epoch(self) -> None:
        pulls = [each for each in getattr(self, "wire", []) if each[0] in ("prompt_pull", "let_go")]
        # a stage is not ready before nobody can write under an older epoch of its pipeline
        self.late, self.fencing = [], []
        super().begin_epoch()
        self.wire += pulls
        self.prompt_actions(self.prompt.cancel_older("token-0", self.epoch))

    def begin_prompt_epoch(self) -> None:
        self.prompt_epoch += 1
        self.prompt = PromptScheduler(
            epoch=self.prompt_epoch,
            num_stages=NUM_PROMPT_STAGES,
            num_blocks=NUM_PROMPT_BLOCKS,
            block_size=BLOCK_SIZE,
            chunk_tokens=CHUNK_TOKENS,
        )
        self.prompt_pool: dict[int, int] = {}
        self.prompt_flying: deque[Step] = deque()
        self.prompt_table: dict[str, tuple[Prefill, list[int]]] = {}
        self.prompt_ends: dict[str, int] = {}
        """so many tokens of each are computed"""
        self.prefills: dict[tuple[str, int, int], Prefill] = {}

    def lose_prompt_pipeline(self) -> None:
        for prefill, _ in self.prompt_table.values():
            if prefill.handoff.epoch == self.epoch and self.draws.random() < 0.5:
                self.leave_behind(prefill, is_direct=self.draws.random() < 0.7)
        self.begin_prompt_epoch()
        untold = [each for each in self.wire if each[0] == "kv_confirmed"]
        del untold[: self.draws.randint(0, len(untold))]  # told over other connections than that a hand-off is over
        self.wire = [each for each in self.wire if each[0] not in TO_PROMPTS and each not in untold]
        self.carry_out(self.token.intake.pipeline_replaced("prompt-0", self.prompt_epoch))

    # ------------------------------------------------------------ writers that live on

    def leave_behind(self, prefill: Prefill, *, is_direct: bool) -> dict[str, int]:
        """A write of one of its stages is not over; returns what to fence off before it is."""
        self.links += 1
        start, end = prefill.handoff.start, len(prefill.token_ids) // 4
        span = (self.draws.randrange(start, end), end)
        authority = {f"link {self.links}": 1, "prompt-0": self.prompt_epoch}
        self.late.append(LateWrite(self.draws.randrange(NUM_STAGES), authority, prefill, span, is_direct))
        return {f"link {self.links}": 2}

    def write_late(self) -> None:
        """One of them happens, and perhaps it was the writer's last."""
        late = self.draws.choice(self.late)
        prefill, tokens = late.prefill, list(memoryview(late.prefill.token_ids).cast("i"))
        first, last = (position // BLOCK_SIZE for position in (late.span[0], late.span[1] - 1))
        for other in self.token.table.sequences.values():
            if (other.sequence_id, other.attempt) != (prefill.sequence_id, prefill.attempt):
                touched = set(prefill.handoff.blocks[first : last + 1])
                assert not touched & set(other.blocks), "a block was given away that somebody may still write to"
        self.write(prefill.handoff.blocks, tokens, late.span)
        self.num_late += 1
        if self.draws.random() < 0.3:
            self.late.remove(late)
            self.answer_fences()

    def write(self, blocks: list[int], tokens: list[int], span: tuple[int, int]) -> None:
        """The KV of these tokens into the token pipeline's pool."""
        start, end = span
        self.pool.update(zip(slots(blocks, start, end, BLOCK_SIZE), kv_of(tokens, end)[start:], strict=True))

    def fence_off(self, stage: int, oldest: dict[str, int]) -> None:
        fence = Fence(oldest)
        refused = [w for w in self.late if w.stage == stage and not w.is_direct and fence.stops(w.authority)]
        self.late = [write for write in self.late if write not in refused]
        self.fencing.append((stage, oldest))
        self.answer_fences()

    def answer_fences(self) -> None:
        for stage, oldest in list(self.fencing):
            fence = Fence(oldest)
            if not any(write.stage == stage and fence.stops(write.authority) for write in self.late):
                self.fencing.remove((stage, oldest))
                self.wire.append(("fenced_off", (self.epoch, stage, oldest)))

    def carry_out(self, actions: Iterable[Action], *, were_shown: bool = False) -> None:
        others: list[Action] = []
        for action in actions:
            match action:
                case Grant():
                    self.grant(action)
                case StopPrefill(sequence_id, attempt):
                    self.wire.append(("cancel_prefill", (self.epoch, sequence_id, attempt)))
                case _:
                    others.append(action)
        super().carry_out(others, were_shown=were_shown)

    def grant(self, grant: Grant) -> None:
        name = grant.sequence_id.split("/")[0]
        prompt = self.requests[name]
        self.token.intake.assign_writer(grant.sequence_id, "prompt-0", self.prompt_epoch)
        sequence = self.token.table.sequences.get(grant.sequence_id)
        assert sequence is not None
        start = grant.held.num_tokens if grant.held else 0
        handoff = Handoff("token-0", self.epoch, grant.blocks, start)
        ids = pack_ids(prompt + grant.forced)
        prefill = Prefill(
            self.prompt_epoch, grant.sequence_id, grant.attempt, 0, len(prompt), ids, sequence.params, handoff,
            grant.held_by, grant.held,
        )  # fmt: skip
        self.wire.append(("prefill", (self.epoch, prefill)))

    # ------------------------------------------------------------ the prompt pipeline

    def start_steps(self) -> None:
        super().start_steps()
        if oldest := self.token.table.fences.take_asked():
            self.wire += [("fence_off", (self.epoch, stage, oldest)) for stage in range(NUM_STAGES)]
        while (step := self.prompt.next_step()) is not None:
            self.prompt_flying.append(step)
        for pull in self.prompt.take_pulls():
            for _ in range(NUM_PROMPT_STAGES):
                self.wire.append(("prompt_pull", (self.epoch, self.prompt_epoch, pull)))

    def run_prompt_step(self) -> None:
        step = self.prompt_flying.popleft()
        for sequence_id in step.closes:
            prefill, blocks = self.prompt_table.pop(sequence_id)
            self.end_writing(prefill)
            computed = list(memoryview(prefill.token_ids).cast("i"))[: self.prompt_ends.pop(sequence_id)]
            for stage in range(NUM_PROMPT_STAGES):
                self.wire.append(("let_go", (self.epoch, self.prompt_epoch, prefill, stage, blocks, computed)))
        opened_now = {opened.sequence_id for opened in step.opens}
        for opened in step.opens:
            assert opened.handoff is not None
            prefill = self.prefills[opened.sequence_id, opened.attempt, opened.handoff.epoch]
            self.prompt_table[opened.sequence_id] = (prefill, list(opened.blocks))
        drawn = []
        for chunk in step.chunks:
            prefill, blocks = self.prompt_table[chunk.sequence_id]
            tokens = list(memoryview(prefill.token_ids).cast("i"))
            end = chunk.start + chunk.num_tokens
            places, values = slots(blocks, 0, end, BLOCK_SIZE), kv_of(tokens, end)
            assert [self.prompt_pool[place] for place in places[: chunk.start]] == values[: chunk.start]
            self.prompt_pool.update(zip(places[chunk.start :], values[chunk.start :], strict=True))
            self.num_prompt_tokens += chunk.num_tokens
            self.prompt_ends[chunk.sequence_id] = end
            start = 0 if chunk.sequence_id in opened_now else chunk.start
            self.hand_off(prefill, tokens, (max(start, prefill.handoff.start), end))
            if chunk.draws:
                drawn.append(Drawn(next_token(tokens)))
        self.prompt_actions(self.prompt.step_done(step.step, drawn))

    def hand_off(self, prefill: Prefill, tokens: list[int], span: tuple[int, int]) -> None:
        handoff = prefill.handoff
        if handoff.epoch != self.epoch or span[0] >= span[1]:
            return
        if self.loses_writes and self.draws.random() < 0.1:
            key = (prefill.sequence_id, prefill.attempt)
            self.unconfirmed.setdefault(key, {}).update(self.leave_behind(prefill, is_direct=False))
            return
        self.write(handoff.blocks, tokens, span)
        self.wire.append(("kv_confirmed", (self.epoch, prefill.sequence_id, prefill.attempt, (0, 1), span, True)))

    def end_writing(self, prefill: Prefill) -> None:
        unconfirmed = self.unconfirmed.pop((prefill.sequence_id, prefill.attempt), {})
        for stage in range(NUM_PROMPT_STAGES):
            lost = unconfirmed if stage == 1 else {}
            ended = (prefill.sequence_id, prefill.attempt, stage, NUM_PROMPT_STAGES, bool(lost), lost)
            self.wire.append(("handoff_ended", (prefill.handoff.epoch, *ended)))

    def let_go(self, prefill: Prefill, stage: int, blocks: list[int], computed: list[int]) -> None:
        """The last of what a stage hands off is read only now."""
        places = slots(blocks, 0, len(computed), BLOCK_SIZE)
        assert [self.prompt_pool[place] for place in places] == kv_of(computed, len(computed))
        self.prompt.let_go((prefill.sequence_id, prefill.attempt, prefill.handoff.epoch), stage)

    def prompt_actions(self, actions: Iterable[PromptAction]) -> None:
        for action in actions:
            prefill = action.prefill
            if isinstance(action, DeliverFirst):
                first = (prefill.handoff.epoch, prefill.sequence_id, prefill.attempt, action.drawn, action.num_computed)
                self.wire.append(("first_token", first))
            elif isinstance(action, NeverStarted):
                self.end_writing(prefill)

    def prompt_pull(self, pull: PullHeld) -> None:
        prefill, held = pull.prefill, pull.prefill.held
        assert held is not None
        tokens = list(memoryview(prefill.token_ids).cast("i"))
        store = self.stores.get(prefill.held_by)
        is_intact = False
        if store is not None:
            values = [store.pool.get(place, 0) for place in slots(held.blocks, 0, held.num_tokens, STORE_BLOCK_SIZE)]
            is_intact = values == kv_of(tokens, held.num_tokens)
            self.prompt_pool.update(zip(slots(pull.blocks, 0, held.num_tokens, BLOCK_SIZE), values, strict=True))
        self.prompt_actions(self.prompt.pulled(prefill.sequence_id, prefill.attempt, is_intact))

    # ------------------------------------------------------------ delivery

    def deliver_one(self) -> None:
        picked = self.wire[self.draws.randrange(len(self.wire))]
        kind = picked[0]
        if kind not in OWN_KINDS:
            self.wire.remove(picked)
            self.deliver(*picked)
            return
        if (sent := _way(*picked)) is not None:
            picked = next(each for each in self.wire if _way(*each) == sent)
        self.wire.remove(picked)
        kind, (epoch, *rest) = picked
        if kind == "let_go":
            if rest[0] == self.prompt_epoch:
                self.let_go(*rest[1:])  # type: ignore[arg-type]
        elif kind == "prompt_pull":
            if rest[0] == self.prompt_epoch:
                self.prompt_pull(rest[1])  # type: ignore[arg-type]
        elif kind == "prefill":
            prefill = rest[0]
            assert isinstance(prefill, Prefill)
            self.prefills[prefill.sequence_id, prefill.attempt, prefill.handoff.epoch] = prefill
            self.prompt.prefill(prefill)
        elif kind == "cancel_prefill":
            self.prompt_actions(self.prompt.cancel(*rest))  # type: ignore[arg-type]
        elif epoch == self.epoch and kind == "fence_off":
            self.fence_off(*rest)  # type: ignore[arg-type]
        elif epoch == self.epoch:
            self.carry_out(getattr(self.token.intake, kind)(*rest))


def _way(kind: str, arguments: tuple[object, ...]) -> str | None:
    """Messages of the same way keep their order; None: those that may overtake all others."""
    if kind in ("prefill", "cancel_prefill"):
        return "to the prompt driver"
    if kind == "first_token" or (kind == "handoff_ended" and arguments[3] == 0):
        return "from the prompt driver"
    return "from the token stages" if kind == "kv_confirmed" else None


def run_one(world: TwoPipelines, draws: random.Random) -> bool:
    """One thing that can happen happens; False: nothing can."""
    world.start_steps()
    choices = ["step"] * bool(world.flying) + ["prompt"] * bool(world.prompt_flying) + ["wire"] * bool(world.wire)
    choices += [name for name, store in world.stores.items() if store.inbox] + ["late"] * bool(world.late)
    if not choices:
        return False
    choice = draws.choice(choices)
    if choice == "step":
        world.run_step()
    elif choice == "prompt":
        world.run_prompt_step()
    elif choice == "late":
        world.write_late()
    elif choice == "wire":
        world.deliver_one()
    else:
        world.run_store(choice)
    world.check_blocks()
    world.prompt.allocator.check()
    return True


@pytest.mark.seeds(40)
def test_whatever_dies_every_token_is_right(seed: int) -> None:
    simulate(seed)


def simulate(seed: int) -> TwoPipelines:
    """One run; raises `AssertionError` where something is wrong, stuck or leaked."""
    draws = random.Random(seed + 2000)
    world = TwoPipelines(seed, num_blocks=40)
    world.loses_writes = seed % 2 == 1
    to_submit = [(f"r{i}", draws.randrange(1, 100), draws.randrange(1, 30)) for i in range(20)]
    faults = draws.sample(["prompt"] * 4 + ["token"] * 2 + ["router"] * 2 + ["lose", "damage"], 7)
    for _ in range(100_000):
        if to_submit and draws.random() < 0.1:
            world.submit(*to_submit.pop())
        if faults and draws.random() < 0.01:
            inject(world, faults.pop())
        if world.away and draws.random() < 0.05:
            world.come_back()
        if not run_one(world, draws):
            if world.away:
                world.come_back()
            elif not to_submit and not faults:
                break
    assert world.ended == set(world.requests)
    assert world.token.table.allocator.num_free == 40
    assert world.token.table.num_running == world.token.table.num_waiting == 0
    assert world.prompt.num_free == NUM_PROMPT_BLOCKS
    return world


def test_writers_that_live_on_write_late() -> None:
    """The runs would say little if nothing landed late, or nothing was ever quarantined."""
    num_late, most_quarantined = 0, 0
    for seed in range(200, 210):
        world = TwoPipelines(seed, num_blocks=40)
        world.loses_writes = True
        draws = random.Random(seed)
        for index in range(12):
            world.submit(f"r{index}", draws.randrange(20, 100), draws.randrange(1, 30))
        while run_one(world, draws):
            if draws.random() < 0.005:
                world.lose_prompt_pipeline()
            most_quarantined = max(most_quarantined, world.token.table.allocator.num_quarantined)
        assert world.ended == set(world.requests)
        assert world.token.table.allocator.num_free == 40
        num_late += world.num_late
    assert num_late > 50 and most_quarantined > 10


def inject(world: TwoPipelines, fault: str) -> None:
    if fault == "prompt":
        world.lose_prompt_pipeline()
    elif fault == "token":
        world.begin_epoch()
    elif fault == "router":
        world.lose_router()
    elif fault == "damage":
        world.damage_store(world.draws.choice(sorted(world.stores)))
    else:
        world.lose_store(sorted(world.stores)[0])


@pytest.mark.parametrize("victim", ["prompt", "token"])
def test_a_prompt_goes_on_where_it_was(victim: str) -> None:
    """96 tokens are six chunks; whoever dies after four, at most one chunk is computed twice."""
    world = TwoPipelines(5, num_blocks=64)
    draws = random.Random(1)
    world.submit("r", 96, 3)
    while world.num_prompt_tokens < 64:
        assert run_one(world, draws)
    while world.wire or any(store.inbox for store in world.stores.values()):
        world.prompt_flying.clear()  # what it computes from here on never gets anywhere
        run_one(world, draws)
    if victim == "token":
        world.begin_epoch()
    world.lose_prompt_pipeline()
    while run_one(world, draws):
        pass
    assert world.ended == {"r"}
    assert world.num_restored
    assert world.num_prompt_tokens <= 96 + CHUNK_TOKENS
    assert world.token.table.costs.recomputed_tokens <= CHUNK_TOKENS
