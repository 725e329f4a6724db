"""One sequence as the driver of a token pipeline sees it, and what the scheduler asks for."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from common.messages import Drawn, SequenceOpen, Step, pack_ids
from common.replica_messages import NEVER, HeldReplica, Placed
from dejavu.params import SamplingParams
from dejavu.wire import WireError
from services.token_stage.fences import Need

MAX_SHOWN = 256
"""So many tokens that a router was given are kept, in case it dies before it has passed them on: a small model draws
hundreds in the time that a busy machine may take to tell of that."""


class Phase(Enum):
    WAITING = "waiting"
    """No blocks: queued, or preempted."""
    PREFILLING = "prefilling"
    """Blocks are lent; a prompt pipeline (or, colocated, this one) computes the prompt, or its KV comes out of a
    store."""
    DECODING = "decoding"
    ENDED = "ended"
    """Nobody wants its tokens any more; blocks go back as soon as nothing can touch them."""


@dataclass(slots=True)
class Sequence:
    """Mutable scheduling state. `tokens` = prompt + output; its KV exists for the first `num_computed`."""

    sequence_id: str
    choice: int
    params: SamplingParams
    num_prompt: int
    tokens: list[int]
    arrival: int
    phase: Phase = Phase.WAITING
    attempt: int = 0
    blocks: list[int] = field(default_factory=list)
    num_scheduled: int = 0
    num_computed: int = 0
    """so many tokens have KV in the pools of all stages"""
    num_reads: int = 0
    """stores that are copying from its blocks"""
    num_pulls: int = 0
    """stages that are copying a replica into its blocks"""
    replica: HeldReplica | None = None
    """what is being pulled, from the store `source`; None: it turned out damaged"""
    source: str = ""
    max_lag: int | None = None
    """a token is delivered only when a store lacks KV of at most so many tokens before it; None: at once"""
    placed: Placed = NEVER
    undelivered: list[Produce] = field(default_factory=list)
    shown: deque[Produce] = field(default_factory=lambda: deque(maxlen=MAX_SHOWN))
    """the last tokens that were delivered"""
    is_orphan: bool = False
    """its router is gone: it pauses with its blocks until the next router asks for it"""
    num_in_flight: int = 0
    is_open: bool = False
    num_lost: int = 0
    """so many had KV in the attempt before, or in an earlier epoch"""
    num_recomputed: int = 0
    """so many of these were computed again in this epoch, after failures"""
    confirmed: list[int] = field(default_factory=list)
    """up to which token each layer is here, of what is handed off"""
    first: Drawn | None = None
    ended_writers: set[int] = field(default_factory=set)
    num_writers: int | None = None
    """prompt stages that must end their hand-off before the blocks may be given away; None: none is known yet"""
    awaits_writers: bool = False
    writer: tuple[str, int] | None = None
    """prompt pipeline and its epoch that compute the current attempt"""
    need: Need = frozenset()
    """what must be fenced off before its blocks are safe from those who were to write to them"""
    stall: tuple[tuple[int, int], float] | None = None
    """how far an attempt was that all prompt stages had ended, and since when it has been no farther"""
    num_stalls: int = 0
    """so many attempts were given up for that"""
    was_preempted: bool = False
    """it gave its blocks to others once: what it costs to go on is no failure's cost"""
    requeue: bool = False
    """once nothing touches its blocks: back to the queue (preempted, or its KV was lost)"""

    @property
    def is_leaving(self) -> bool:
        """Its blocks go back as soon as nothing can touch them."""
        return self.phase is Phase.ENDED or self.requeue

    @property
    def is_touched(self) -> bool:
        """Whether anybody may still read or write its blocks."""
        return bool(self.num_in_flight or self.num_reads or self.num_pulls or self.awaits_writers)

    @property
    def is_asking(self) -> bool:
        """Whether it waits to hear what its store has of it."""
        return self.phase is Phase.PREFILLING and bool(self.source) and self.replica is None and not self.num_pulls

    def confirm(self, layers: tuple[int, int], tokens: tuple[int, int]) -> bool:
        """These tokens of these layers are here. False: some before them are not."""
        first, last = layers
        if any(end != tokens[0] for end in self.confirmed[first:last]):
            return False
        self.confirmed[first:last] = [tokens[1]] * (last - first)
        return True

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def frames_after(self, prompt: list[int], forced: list[int], params: SamplingParams) -> list[Produce] | None:
        """What was delivered after the output `forced`; None where this is another sequence, or where more is missing
        than is kept."""
        known = len(prompt) + len(forced)
        is_same = self.num_prompt == len(prompt) and self.tokens[:known] == prompt + forced and self.params == params
        return self.frames_from(len(forced)) if is_same else None

    def frames_from(self, index: int) -> list[Produce] | None:
        """What was delivered from there on; None where that is more than is kept."""
        if index < self.num_output - len(self.undelivered) - len(self.shown):
            return None
        return [produced for produced in self.shown if produced.index >= index]

    def opened(self) -> SequenceOpen:
        """What stages keep of it."""
        return SequenceOpen(
            self.sequence_id,
            self.attempt,
            self.choice,
            self.num_prompt,
            pack_ids(self.tokens),
            self.params,
            list(self.blocks),
        )


@dataclass(frozen=True, slots=True)
class Grant:
    """Have the sequence prefilled into `blocks`, behind the tokens that the store `held_by` had, if any."""

    sequence_id: str
    attempt: int
    blocks: list[int]
    forced: list[int]
    held_by: str = ""
    held: HeldReplica | None = None


@dataclass(frozen=True, slots=True)
class Produce:
    """Deliver a token; `finish_reason` marks the sequence's last."""

    sequence_id: str
    index: int
    drawn: Drawn
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Fail:
    sequence_id: str
    error: WireError


@dataclass(frozen=True, slots=True)
class StopPrefill:
    """Tell the prompt pipeline that this attempt's prefill is not wanted any more."""

    sequence_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class AskStore:
    """Ask a store for a replica of the sequence."""

    sequence_id: str
    store: str


@dataclass(frozen=True, slots=True)
class PullReplica:
    """Have every stage copy its part of `sequence.replica` into the sequence's blocks."""

    sequence_id: str


Action = Grant | Produce | Fail | StopPrefill | AskStore | PullReplica


def max_lag(durability: str) -> int | None:
    """ "async" is None, "lag:k" is k, "sync" is 0."""
    if durability == "async":
        return None
    return int(durability.partition(":")[2] or 0)


def too_long(num_prompt: int, max_tokens: int, needed: int, num_blocks: int) -> WireError:
    """The refusal of a sequence that would not fit even alone."""
    message = (
        f"prompt ({num_prompt} tokens) and max_tokens ({max_tokens}) need {needed} KV blocks; "
        f"a token stage has {num_blocks} (raise --kv-memory or lower max_tokens)"
    )
    return WireError("context_exceeded", message, "max_tokens")


@dataclass(frozen=True, slots=True)
class FlyingStep:
    """A step on its way through the pipeline, with the sequences in it, in chunk order."""

    step: Step
    sequences: tuple[Sequence, ...]
