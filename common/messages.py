"""What services say to each other, grouped by who receives: `RouterInboxMessage`, `StageInboxMessage` and
`StoreInboxMessage`. What is about copies of KV is in `replica_messages`, what is about its hand-off in
`handoff_messages`.

One ZeroMQ message is the encoded struct, followed by an optional payload frame (hidden states of a `Step`).
Whatever depends on who owns a pipeline carries that pipeline's epoch; older epochs are refused at the door.
A *sequence* is one choice of a request (`sequence_id` = "request_id/choice/term"); an *attempt* counts how often its
KV cache was built (first prefill, again after a preemption or a failure), so that late messages are told apart.
Token ids travel as little-endian int32 bytes (`pack_ids`).
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable

import msgspec

from common.handoff_messages import (
    EndAwaited,
    FencedOff,
    FenceOff,
    Handoff,
    HandoffEnded,
    KvArrived,
    KvConfirmed,
    LetGo,
    LetGoAwaited,
)
from common.replica_messages import (
    NEVER,
    Claim,
    Claimed,
    HeldReplica,
    Locate,
    Located,
    Placed,
    Pull,
    Pulled,
    Replicate,
    Replicated,
)
from dejavu.params import SamplingParams
from dejavu.wire import WireError, decode_strictly

REPEAT_S = 2.0
"""What was not answered for so long is said again: a connection that breaks loses what was on its way."""


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as little-endian int32 bytes."""
    packed = array.array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """Inverse of `pack_ids`. Raises `ValueError` where the length is no multiple of 4."""
    packed = array.array("i")
    packed.frombytes(data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


class Drawn(msgspec.Struct, frozen=True, array_like=True):
    """One sampled token with the log-probabilities that were asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = []


# ---------------------------------------------------------------- to a router


class PipelineReady(msgspec.Struct, frozen=True, array_like=True, tag="pipeline_ready"):
    """A pipeline's driver reports to routers (a prompt pipeline's also to token drivers) that all its stages run
    this epoch, and how much KV fits; and again, as long as they are all there."""

    pipeline: str
    epoch: int
    capacity_tokens: int


class ProducedToken(msgspec.Struct, frozen=True, array_like=True):
    """`finish_reason` is set on a sequence's last token; the driver has let go of the sequence then."""

    sequence_id: str
    index: int
    drawn: Drawn
    finish_reason: str | None = None


class TokensProduced(msgspec.Struct, frozen=True, array_like=True, tag="tokens_produced"):
    pipeline: str
    epoch: int
    tokens: list[ProducedToken]


class SequenceFailed(msgspec.Struct, frozen=True, array_like=True, tag="sequence_failed"):
    pipeline: str
    epoch: int
    sequence_id: str
    error: WireError


class Orphans(msgspec.Struct, frozen=True, array_like=True, tag="orphans"):
    """Token driver to all routers, when `router` has died: its sequences (by replica key) pause here, and go on where
    they are for the router that admits them again. To one that has just started (it is `router` then): all there are,
    as nobody may know yet that theirs has died."""

    pipeline: str
    epoch: int
    router: str
    keys: list[str]


class SequencesUnknown(msgspec.Struct, frozen=True, array_like=True, tag="sequences_unknown"):
    """Answers `TokensAwaited`: these the driver has never had, or they have ended, or it does not keep the tokens any
    more that the router lacks."""

    pipeline: str
    epoch: int
    sequence_ids: list[str]


class StatsReply(msgspec.Struct, frozen=True, array_like=True, tag="stats_reply"):
    """A service's own figures for `status`: msgpack map of strings and numbers (nested maps allowed)."""

    query_id: int
    name: str
    stats: bytes


class Beat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """Every service to every router, from its event loop: it turns. `overdue_s` > 0: its compute thread is stuck."""

    name: str
    incarnation: str
    overdue_s: float = 0.0


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """The leading router to any service: end in order; somebody else does your work."""


RouterInboxMessage = (
    PipelineReady | TokensProduced | SequenceFailed | SequencesUnknown | Orphans | StatsReply | Beat | Stop
)

# ---------------------------------------------------------------- to a stage


class StatsQuery(msgspec.Struct, frozen=True, array_like=True, tag="stats_query"):
    query_id: int
    reply_to: str


class StageReady(msgspec.Struct, frozen=True, array_like=True, tag="stage_ready"):
    """A stage tells its pipeline's driver, again and again, that it runs this epoch with `num_blocks` KV blocks. With a
    host tier these lie there, the device holds `num_device_blocks` of them, and to bring one in takes about
    `block_copy_s`."""

    epoch: int
    stage_index: int
    num_blocks: int
    num_device_blocks: int | None = None
    block_copy_s: float = 0.0

    @property
    def num_sequence_blocks(self) -> int:
        """What one sequence can have."""
        return self.num_blocks if self.num_device_blocks is None else min(self.num_blocks, self.num_device_blocks)


class Admit(msgspec.Struct, frozen=True, array_like=True, tag="admit"):
    """Router to token driver: queue this sequence. `forced` are output ids that are known already;
    `prompt_pipeline` is where its prompt should be computed ('' in a colocated pipeline). `came_from` is the token
    pipeline that this router had given it to before. `placed` is later than that of any pipeline that had it before.
    `follows` is since which etcd revision the router led that led before this one; 0: that is not known."""

    epoch: int
    sequence_id: str
    choice: int
    prompt: bytes
    forced: bytes
    params: SamplingParams
    prompt_pipeline: str
    came_from: str = ""
    placed: Placed = NEVER
    follows: int = 0


class CancelSequence(msgspec.Struct, frozen=True, array_like=True, tag="cancel_sequence"):
    sequence_id: str


class TokensAwaited(msgspec.Struct, frozen=True, array_like=True, tag="tokens_awaited"):
    """Router to token driver, now and then: of these sequences (each with how many tokens it has, forced ones included)
    nothing was heard for a while. What was produced since is said again; `SequencesUnknown` names the others."""

    epoch: int
    sequences: list[tuple[str, int]]


class Prefill(msgspec.Struct, frozen=True, array_like=True, tag="prefill"):
    """Token driver to prompt driver: the grant (blocks for these tokens and one more) and the work.
    `token_ids` = prompt + known output; the next token is drawn from it. What the store `held_by` has in `held` need
    not be computed."""

    epoch: int
    sequence_id: str
    attempt: int
    choice: int
    num_prompt_tokens: int
    token_ids: bytes
    params: SamplingParams
    handoff: Handoff
    held_by: str = ""
    held: HeldReplica | None = None


class CancelPrefill(msgspec.Struct, frozen=True, array_like=True, tag="cancel_prefill"):
    sequence_id: str
    attempt: int


class FirstToken(msgspec.Struct, frozen=True, array_like=True, tag="first_token"):
    """Prompt driver to token driver: the token that the prefill drew; so many tokens were computed for it, the others'
    KV was there."""

    epoch: int
    sequence_id: str
    attempt: int
    drawn: Drawn
    num_computed: int


class SequenceOpen(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters a pipeline: every stage keeps its ids and block table until it is closed."""

    sequence_id: str
    attempt: int
    choice: int
    num_prompt_tokens: int
    token_ids: bytes
    params: SamplingParams
    blocks: list[int]
    handoff: Handoff | None = None


class ChunkWork(msgspec.Struct, frozen=True, array_like=True):
    """The next `num_tokens` tokens of a sequence, from `start`; `new_blocks` lengthen its block table.
    `appended` is the last drawn token, which stages but the last do not know yet (None: nothing new)."""

    sequence_id: str
    start: int
    num_tokens: int
    new_blocks: list[int]
    appended: int | None
    draws: bool


class SwapFigures(msgspec.Struct, frozen=True, array_like=True):
    """What bringing a step's sequences in took on the stage where it took longest."""

    copy_s: float = 0.0
    waited_s: float = 0.0
    num_blocks: int = 0


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """One pass through a pipeline: first the closes, then the opens, then the chunks. Every stage sees the steps
    in the same order, so their tables agree. `upcoming` are the sequences that the next step will probably have, with
    how many tokens they have KV of; `parked` will not come for a while; `swap` is the worst of the stages so far."""

    epoch: int
    step: int
    closes: list[str]
    opens: list[SequenceOpen]
    chunks: list[ChunkWork]
    upcoming: list[tuple[str, int]] = []
    parked: list[str] = []
    swap: SwapFigures | None = None


class StepDone(msgspec.Struct, frozen=True, array_like=True, tag="step_done"):
    """Last stage to driver: what the drawing chunks of the step drew, in their order."""

    epoch: int
    step: int
    drawn: list[Drawn]
    swap: SwapFigures | None = None


StageInboxMessage = (
    Stop
    | StatsQuery
    | PipelineReady
    | StageReady
    | Admit
    | TokensAwaited
    | CancelSequence
    | Prefill
    | CancelPrefill
    | FirstToken
    | KvArrived
    | KvConfirmed
    | HandoffEnded
    | EndAwaited
    | LetGo
    | LetGoAwaited
    | FenceOff
    | FencedOff
    | Step
    | StepDone
    | Claim
    | Claimed
    | Replicated
    | Located
    | Pull
    | Pulled
)

StoreInboxMessage = Stop | StatsQuery | Claim | Replicate | Locate

Message = RouterInboxMessage | StageInboxMessage | StoreInboxMessage

_encoder = msgspec.msgpack.Encoder()
_router_decoder = msgspec.msgpack.Decoder(RouterInboxMessage)
_stage_decoder = msgspec.msgpack.Decoder(StageInboxMessage)
_store_decoder = msgspec.msgpack.Decoder(StoreInboxMessage)


def encode(message: Message) -> bytes:
    """The message's first frame."""
    return _encoder.encode(message)


def decode_router_inbox(frame: bytes | memoryview) -> RouterInboxMessage:
    """A message to a router. Raises `msgspec.DecodeError`."""
    message: RouterInboxMessage = decode_strictly(_router_decoder, frame)
    return message


def decode_stage_inbox(frame: bytes | memoryview) -> StageInboxMessage:
    """A message to a stage. Raises `msgspec.DecodeError`."""
    message: StageInboxMessage = decode_strictly(_stage_decoder, frame)
    return message


def decode_store_inbox(frame: bytes | memoryview) -> StoreInboxMessage:
    """A message to a cache store. Raises `msgspec.DecodeError`."""
    message: StoreInboxMessage = decode_strictly(_store_decoder, frame)
    return message
