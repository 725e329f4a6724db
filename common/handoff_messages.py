"""What is said about KV on its way into a token pipeline's pool: where it goes, what has arrived, who writes no more.

A part of what stages receive (`messages.StageInboxMessage`).
"""

from __future__ import annotations

import msgspec


class Handoff(msgspec.Struct, frozen=True, array_like=True):
    """Where a prefill's KV goes: the granted blocks of a token pipeline at an epoch. The first `start` tokens' is
    there already."""

    pipeline: str
    epoch: int
    blocks: list[int]
    start: int = 0


class KvArrived(msgspec.Struct, frozen=True, array_like=True, tag="kv_arrived"):
    """Prompt stage to token stage: these tokens' KV of `layers` (absolute, end exclusive) lies in your pool.

    `token_hash` is the hash of the token ids up to the range's end; it is part of what `checksum` binds.
    """

    epoch: int
    sequence_id: str
    attempt: int
    layers: tuple[int, int]
    start: int
    num_tokens: int
    blocks: list[int]
    token_hash: bytes
    checksum: int


class KvConfirmed(msgspec.Struct, frozen=True, array_like=True, tag="kv_confirmed"):
    """Token stage to its driver: tokens [start, start + num_tokens) of `layers` were verified (or found corrupt)."""

    epoch: int
    sequence_id: str
    attempt: int
    layers: tuple[int, int]
    start: int
    num_tokens: int
    intact: bool


class HandoffEnded(msgspec.Struct, frozen=True, array_like=True, tag="handoff_ended"):
    """Prompt stage to token driver: it will write nothing more for this attempt; `error` if a write failed. What it
    wrote before may yet arrive until what is `unconfirmed` (name: oldest epoch) has been fenced off."""

    epoch: int
    sequence_id: str
    attempt: int
    stage_index: int
    num_stages: int
    error: str | None = None
    unconfirmed: dict[str, int] = {}


class EndAwaited(msgspec.Struct, frozen=True, array_like=True, tag="end_awaited"):
    """Token driver of `pipeline` at `pipeline_epoch` to prompt driver, now and then: these (sequence, attempt) have not
    ended as far as we have heard. Those that it does not know, or not any more, it answers with a `HandoffEnded` of
    all its stages that names an error: messages about them were lost."""

    epoch: int
    pipeline: str
    pipeline_epoch: int
    handoffs: list[tuple[str, int]]


class LetGo(msgspec.Struct, frozen=True, array_like=True, tag="let_go"):
    """Prompt stage to its driver: nothing reads the blocks any more of this closed prompt, which a token pipeline had
    asked for in its epoch `asked_in`. `unconfirmed` is as in `HandoffEnded`."""

    epoch: int
    sequence_id: str
    attempt: int
    asked_in: int
    stage_index: int
    unconfirmed: dict[str, int] = {}


class LetGoAwaited(msgspec.Struct, frozen=True, array_like=True, tag="let_go_awaited"):
    """Prompt driver to each of its stages, now and then: as far as we have heard you have not said `LetGo` of these
    prompts, (sequence, attempt, `asked_in`). What has been said is said again."""

    epoch: int
    prompts: list[tuple[str, int, int]]


class FenceOff(msgspec.Struct, frozen=True, array_like=True, tag="fence_off"):
    """Token driver to each of its stages: let nobody write to your pool under older epochs than these (by the name of
    what the epoch belongs to: a pipeline, or a link)."""

    epoch: int
    oldest: dict[str, int]


class FencedOff(msgspec.Struct, frozen=True, array_like=True, tag="fenced_off"):
    """Answers `FenceOff` once nothing of older epochs can change the pool any more: as long as a writer that cannot be
    refused has not ended there is no answer."""

    epoch: int
    stage_index: int
    oldest: dict[str, int]
