"""When to strike: while prompts are computed, as the KV of one is handed over, or among token steps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.history import Stream

LATEST = 0.7
"""of a run without a fault: what is struck must still have something to do"""
LOOK_S = 0.001
TOO_LATE = "too late"


@dataclass(frozen=True, slots=True)
class Timing:
    """Of a run without a fault, from its beginning."""

    first_token_s: float
    """the last stream's"""
    longest_s: float


def timing_of(streams: Sequence[Stream], started_s: float) -> Timing:
    """`streams` ran without a fault, all from `started_s` (monotonic) on."""
    first_s = max(stream.tokens[0][0] for stream in streams) - started_s
    return Timing(first_s, max(stream.tokens[-1][0] for stream in streams) - started_s)


async def await_moment(aim: str, streams: Sequence[Stream], draws: random.Random, timing: Timing) -> None:
    """Returns when it is time; `streams` have just been asked for. A first token is shown as soon as it is drawn, while
    the KV that belongs to it is on its way: that is the moment of a hand-off."""
    if aim == "prefill":
        await _first_tokens(streams, draws.randrange(len(streams)))
        await asyncio.sleep(draws.uniform(0.0, timing.first_token_s / len(streams)))
    elif aim == "hand-off":
        await _first_tokens(streams, draws.randrange(1, len(streams) + 1))
    else:
        await asyncio.sleep(draws.uniform(timing.first_token_s, LATEST * timing.longest_s))


async def _first_tokens(streams: Sequence[Stream], count: int) -> None:
    """Returns when so many of the streams have begun."""
    while sum(bool(stream.tokens) for stream in streams) < count:  # noqa: ASYNC110 - nothing tells us
        await asyncio.sleep(LOOK_S)


def moment_of(streams: Sequence[Stream]) -> str:
    """Where a strike meets them: "hand-off" where the newest token of any is its first, "prefill" where some have none
    yet, `TOO_LATE` where all have ended, else "decode"."""
    if all(stream.ended for stream in streams):
        return TOO_LATE
    newest = max((stream for stream in streams if stream.tokens), key=lambda s: s.tokens[-1][0], default=None)
    if newest is not None and len(newest.tokens) == 1:
        return "hand-off"
    return "decode" if all(stream.tokens for stream in streams) else "prefill"
