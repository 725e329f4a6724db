"""One sequence as the driver of a token pipeline sees it, and what the scheduler asks the service to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from common.messages import Drawn, Step
from dejavu.params import SamplingParams
from dejavu.wire import WireError


class Phase(Enum):
    WAITING = "waiting"
    """No blocks: queued, or preempted."""
    PREFILLING = "prefilling"
    """Blocks are lent; a prompt pipeline (or, colocated, this one) computes the prompt."""
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
    num_in_flight: int = 0
    is_open: bool = False
    num_cells: int = 0
    """tokens x layers whose hand-off was verified"""
    first: Drawn | None = None
    ended_writers: set[int] = field(default_factory=set)
    num_writers: int | None = None
    """prompt stages that must end their hand-off before the blocks may be given away; None: none is known yet"""
    awaits_writers: bool = False
    writer: tuple[str, int] | None = None
    """prompt pipeline and its epoch that compute the current attempt"""
    requeue: bool = False
    """once nothing touches its blocks: back to the queue (preempted, or its KV was lost)"""

    @property
    def is_leaving(self) -> bool:
        """Its blocks go back as soon as nothing can touch them."""
        return self.phase is Phase.ENDED or self.requeue

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


@dataclass(frozen=True, slots=True)
class Grant:
    """Ask the router to have the sequence prefilled into `blocks`."""

    sequence_id: str
    attempt: int
    blocks: list[int]
    forced: list[int]


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


Action = Grant | Produce | Fail | StopPrefill


@dataclass(frozen=True, slots=True)
class FlyingStep:
    """A step on its way through the pipeline, with the sequences in it, in chunk order."""

    step: Step
    sequences: tuple[Sequence, ...]
