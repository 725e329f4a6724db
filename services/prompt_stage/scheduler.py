"""The driver of a prompt pipeline decides here (pure): which prompts get blocks, what the next chunk computes.

A prompt's blocks are its own from its open until every stage has seen its close and has nothing left to hand off out of
them. What was computed stays there until the blocks are needed (`Retained`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from common.kv.blocks import BlockAllocator
from common.kv.token_ids import ID_BYTES
from common.messages import ChunkWork, Drawn, Prefill, SequenceOpen, Step
from common.replica_messages import replica_key
from common.stage.prefill_plan import PendingPrompt, plan_chunk
from services.prompt_stage.retained import Kept, Retained

MAX_DISOWNED = 4096

Key = tuple[str, int]
"""A prompt's sequence id and attempt."""
FullKey = tuple[str, int, int]
"""A key, and the epoch of the token pipeline that has asked."""
Asker = tuple[str, int]
"""A token pipeline at one of its epochs."""


@dataclass(slots=True)
class PromptSequence:
    """Mutable scheduling state of one prefill; `sequence_id` and `attempt` together name it."""

    prefill: Prefill
    num_tokens: int
    arrival: int
    num_scheduled: int = 0
    num_computed: int = 0
    """so many of its first tokens have KV in all stages' pools"""
    num_found: int = 0
    """... and of so many it was there before"""
    num_in_flight: int = 0
    num_pulls: int = 0
    """stages that are copying the beginning out of a store"""
    readers: set[int] = field(default_factory=set)
    """stages that may still be handing off, once it is closed"""
    is_open: bool = False
    is_cancelled: bool = False
    lease: int = -1
    blocks: list[int] = field(default_factory=list)
    request_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.request_id = replica_key(self.prefill.sequence_id).rpartition("/")[0]

    @property
    def key(self) -> Key:
        return self.prefill.sequence_id, self.prefill.attempt

    @property
    def full_key(self) -> FullKey:
        """What no other prompt of ours is ever called."""
        return *self.key, self.prefill.handoff.epoch


@dataclass(frozen=True, slots=True)
class DeliverFirst:
    """The prefill is complete and drew a token, after `num_computed` tokens that nobody had computed."""

    prefill: Prefill
    drawn: Drawn
    num_computed: int


@dataclass(frozen=True, slots=True)
class NeverStarted:
    """Cancelled before any stage heard of it: no stage will ever write its KV."""

    prefill: Prefill


@dataclass(frozen=True, slots=True)
class PullHeld:
    """Have every stage copy its layers of `prefill.held` into the sequence's `blocks`."""

    prefill: Prefill
    blocks: list[int]


Action = DeliverFirst | NeverStarted | PullHeld


class PromptScheduler:
    """State of one prompt pipeline at one epoch."""

    def __init__(self, *, epoch: int, num_stages: int, num_blocks: int, block_size: int, chunk_tokens: int) -> None:
        self.epoch = epoch
        self.allocator = BlockAllocator(num_blocks)
        self._num_stages = num_stages
        self._max_flying = num_stages + 1
        self._block_size = block_size
        self._chunk_tokens = chunk_tokens
        self._waiting: OrderedDict[Key, PromptSequence] = OrderedDict()
        self._running: dict[str, PromptSequence] = {}
        self._closed: dict[Key, PromptSequence] = {}
        """some stage may still be handing them off"""
        self._retained = Retained()
        self._disowned: OrderedDict[tuple[Asker, Key], None] = OrderedDict()
        self._unconfirmed: dict[str, int] = {}
        """what hand-offs that are over may have left under way: by link, the oldest one that has not"""
        self._num_found_tokens = 0
        self._num_leases = 0
        self._flying: dict[int, tuple[Step, tuple[PromptSequence, ...]]] = {}
        self._opens: list[SequenceOpen] = []
        self._closes: list[str] = []
        self._pulls: list[PullHeld] = []
        self._num_arrivals = 0
        self._num_steps = 0

    def kv_blocks(self) -> dict[str, int]:
        """For `status`: what is retained counts as free."""
        return self.allocator.figures() | {"free": self.num_free}

    def retained(self) -> dict[str, int]:
        """What lies in blocks that are free for others, and how much of such was of use."""
        return {"blocks": self._retained.num_blocks, "found_tokens": self._num_found_tokens}

    @property
    def num_free(self) -> int:
        """Blocks that a prompt could get, those of retained ones included."""
        return self.allocator.num_free + self._retained.num_blocks

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def prefill(self, prefill: Prefill) -> None:
        """Queues a prompt. Its tokens fit the pool: whoever asks knows our `capacity_tokens`."""
        if (_asker(prefill), (prefill.sequence_id, prefill.attempt)) in self._disowned:
            return  # its blocks are somebody else's by now
        sequence = PromptSequence(prefill, len(prefill.token_ids) // ID_BYTES, self._num_arrivals)
        self._num_arrivals += 1
        self._waiting[sequence.key] = sequence
        self._start_waiting()

    def cancel(self, sequence_id: str, attempt: int) -> list[Action]:
        """Stops a prefill. Unknown ones (finished already) are ignored."""
        waiting = self._waiting.pop((sequence_id, attempt), None)
        if waiting is not None:
            return [NeverStarted(waiting.prefill)]
        sequence = self._running.get(sequence_id)
        if sequence is not None and sequence.prefill.attempt == attempt:
            sequence.is_cancelled = True
            return self._close_if_idle(sequence)
        return []

    def cancel_older(self, pipeline: str, epoch: int) -> list[Action]:
        """A token pipeline runs a new epoch: what its older ones wanted would go nowhere."""
        sequences = [*self._waiting.values(), *self._running.values()]
        prefills = [sequence.prefill for sequence in sequences if not sequence.is_cancelled]
        old = [p for p in prefills if p.handoff.pipeline == pipeline and p.handoff.epoch < epoch]
        return [action for prefill in old for action in self.cancel(prefill.sequence_id, prefill.attempt)]

    def take_pulls(self) -> list[PullHeld]:
        """What is to be copied before the prompts that just got their blocks can begin."""
        pulls, self._pulls = self._pulls, []
        return pulls

    def pulled(self, sequence_id: str, attempt: int, intact: bool) -> list[Action]:
        """A stage has copied its part; when all have, the rest is computed, or everything where the copy is no good."""
        sequence = self._running.get(sequence_id)
        if sequence is None or sequence.prefill.attempt != attempt or not sequence.num_pulls:
            return []
        sequence.num_pulls -= 1
        if not intact:
            sequence.num_scheduled = sequence.num_found = 0
        if not sequence.num_pulls:
            sequence.num_computed = sequence.num_scheduled
        return self._close_if_idle(sequence) if sequence.is_cancelled else []

    def step_done(self, step: int, drawn: list[Drawn]) -> list[Action]:
        """The last stage finished a step. Raises `KeyError` for a step that is not in flight."""
        done, sequences = self._flying.pop(step)
        draws = iter(drawn)
        actions: list[Action] = []
        for chunk, sequence in zip(done.chunks, sequences, strict=True):
            sequence.num_in_flight -= 1
            sequence.num_computed = chunk.start + chunk.num_tokens
            token = next(draws) if chunk.draws else None
            if token is not None and not sequence.is_cancelled:
                actions.append(DeliverFirst(sequence.prefill, token, sequence.num_tokens - sequence.num_found))
                sequence.is_cancelled = True  # nothing is left to do but to close it
            if sequence.is_cancelled:
                actions += self._close_if_idle(sequence)
        return actions

    def next_step(self) -> Step | None:
        """The next chunk of several prompts, or None. A step without chunks only closes sequences."""
        if len(self._flying) >= self._max_flying:
            return None
        self._start_waiting()
        pending = [
            PendingPrompt(s.prefill.sequence_id, s.num_tokens - s.num_scheduled, s.arrival)
            for s in self._running.values()
            if s.num_scheduled < s.num_tokens and not s.is_cancelled and not s.num_pulls
        ]
        chunks: list[ChunkWork] = []
        sequences: list[PromptSequence] = []
        for sequence_id, num_tokens in plan_chunk(pending, self._chunk_tokens):
            sequence = self._running[sequence_id]
            chunks.append(self._chunk(sequence, num_tokens))
            sequences.append(sequence)
        if not chunks and not self._closes:
            return None
        step = Step(self.epoch, self._num_steps, self._closes, self._opens, chunks)
        self._opens, self._closes = [], []
        self._flying[step.step] = (step, tuple(sequences))
        self._num_steps += 1
        return step

    def _chunk(self, sequence: PromptSequence, num_tokens: int) -> ChunkWork:
        prefill = sequence.prefill
        if not sequence.is_open:
            sequence.is_open = True
            self._opens.append(
                SequenceOpen(
                    prefill.sequence_id,
                    prefill.attempt,
                    prefill.choice,
                    prefill.num_prompt_tokens,
                    prefill.token_ids,
                    prefill.params,
                    sequence.blocks,
                    prefill.handoff,
                )
            )
        start = sequence.num_scheduled
        sequence.num_scheduled += num_tokens
        sequence.num_in_flight += 1
        draws = sequence.num_scheduled == sequence.num_tokens
        return ChunkWork(prefill.sequence_id, start, num_tokens, [], None, draws)

    def _start_waiting(self) -> None:
        """First come, first served for memory: a big prompt at the head waits for room, none overtakes it."""
        started: list[Key] = []
        computing = {s.request_id: s for s in (*self._closed.values(), *self._running.values())}
        closed = {sequence_id for sequence_id, _ in self._closed}
        for key, sequence in self._waiting.items():
            if sequence.prefill.sequence_id in self._running:
                break  # its previous attempt is still being closed
            if sequence.prefill.sequence_id in closed:
                continue  # what that has computed will be found
            other = computing.get(sequence.request_id)
            if other is not None and other.prefill.token_ids == sequence.prefill.token_ids:
                continue  # another choice, whose KV will be found
            if not self._find_room(sequence):
                break
            started.append(key)
            computing[sequence.request_id] = self._running[sequence.prefill.sequence_id] = sequence
        for key in started:
            del self._waiting[key]

    def _find_room(self, sequence: PromptSequence) -> bool:
        """Lends the blocks, with what lies in them already: left there by its request, or to be copied from a store."""
        prefill, needed = sequence.prefill, -(-sequence.num_tokens // self._block_size)
        found = self._retained.take(sequence.request_id, prefill.token_ids)
        kept, num_found = found or (None, 0)
        sequence.lease, sequence.blocks = (self._num_leases, []) if kept is None else (kept.lease, list(kept.blocks))
        if not self._grow(sequence, needed):
            if kept is not None:
                self._retained.keep(kept)
            return False
        self._num_leases += kept is None
        self._num_found_tokens += num_found
        num_held = 0 if prefill.held is None else prefill.held.num_tokens
        # the last token is computed again, for what it leads to
        sequence.num_found = sequence.num_scheduled = max(min(num_found, sequence.num_tokens - 1), num_held)
        if num_held > num_found:
            sequence.num_pulls = self._num_stages
            self._pulls.append(PullHeld(prefill, list(sequence.blocks)))
        else:
            sequence.num_computed = sequence.num_scheduled
        return True

    def _grow(self, sequence: PromptSequence, needed: int) -> bool:
        """Gives a sequence the blocks that it lacks, if need be those of retained prompts."""
        missing = needed - len(sequence.blocks)
        if missing > self.num_free:
            return False
        if missing <= 0:
            return True
        while missing > self.allocator.num_free and (oldest := self._retained.take_oldest()) is not None:
            self.allocator.release(oldest.lease)
        more = (
            self.allocator.extend(sequence.lease, missing)
            if sequence.blocks
            else self.allocator.allocate(sequence.lease, missing, missing)
        )
        sequence.blocks += more or []
        return more is not None

    def _close_if_idle(self, sequence: PromptSequence) -> list[Action]:
        if sequence.num_in_flight or sequence.num_pulls:
            return []
        del self._running[sequence.prefill.sequence_id]
        if not sequence.is_open:
            self._give_back(sequence)
            return [NeverStarted(sequence.prefill)]
        sequence.readers.update(range(self._num_stages))
        self._closed[sequence.key] = sequence
        self._closes.append(sequence.prefill.sequence_id)
        return []

    def disown(self, handoffs: Iterable[Key], asker: Asker) -> tuple[list[Key], dict[str, int]]:
        """Those that a token pipeline waits for and that are unknown here: they have ended, or were never heard of, and
        will not begin any more. And what has to be fenced off before their blocks are safe."""
        known = {s.key for s in (*self._waiting.values(), *self._running.values(), *self._closed.values())
                 if _asker(s.prefill) == asker}  # fmt: skip
        unknown = [key for key in handoffs if key not in known]
        for key in unknown:
            self._disowned[asker, key] = None
        while len(self._disowned) > MAX_DISOWNED:
            self._disowned.popitem(last=False)
        return unknown, dict(self._unconfirmed)

    def not_let_go(self, stage_index: int) -> list[FullKey]:
        """The closed prompts that this stage may still be handing off, as far as we have heard."""
        return [sequence.full_key for sequence in self._closed.values() if stage_index in sequence.readers]

    def let_go(self, prompt: FullKey, stage_index: int, unconfirmed: Mapping[str, int] | None = None) -> None:
        """A stage has nothing left to hand off of a prompt that it was told to close; what may still be under way is
        `unconfirmed`. It may say so more than once."""
        for name, oldest in (unconfirmed or {}).items():
            self._unconfirmed[name] = max(oldest, self._unconfirmed.get(name, 0))
        sequence = self._closed.get(prompt[:2])
        if sequence is None or sequence.full_key != prompt or stage_index not in sequence.readers:
            return
        sequence.readers.remove(stage_index)
        if not sequence.readers:
            del self._closed[sequence.key]
            self._give_back(sequence)
            self._start_waiting()

    def _give_back(self, sequence: PromptSequence) -> None:
        if not sequence.num_computed:
            self.allocator.release(sequence.lease)
            return
        token_ids = sequence.prefill.token_ids[: ID_BYTES * sequence.num_computed]
        self._retained.keep(Kept(sequence.lease, sequence.request_id, sequence.blocks, token_ids))


def _asker(prefill: Prefill) -> Asker:
    return prefill.handoff.pipeline, prefill.handoff.epoch
