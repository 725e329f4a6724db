"""What a token driver hears about its sequences, as the scheduler takes it."""

from __future__ import annotations

import logging
from typing import assert_never

from common.handoff_messages import FencedOff, HandoffEnded, KvConfirmed
from common.messages import FirstToken
from common.replica_messages import Claimed, Located, Pulled, Replicated
from services.token_stage.scheduler import TokenScheduler
from services.token_stage.sequence import Action

logger = logging.getLogger(__name__)

Event = FirstToken | KvConfirmed | HandoffEnded | FencedOff | Claimed | Replicated | Located | Pulled
"""All of one epoch of our pipeline."""


def take(scheduler: TokenScheduler, event: Event) -> list[Action]:
    """What there is to do now."""
    match event:
        case FirstToken(_, sequence_id, attempt, drawn, num_computed):
            return scheduler.intake.first_token(sequence_id, attempt, drawn, num_computed)
        case KvConfirmed(_, sequence_id, attempt, layers, start, count, intact):
            return scheduler.intake.kv_confirmed(sequence_id, attempt, layers, (start, start + count), intact)
        case HandoffEnded():
            return _handoff_ended(scheduler, event)
        case FencedOff(_, stage_index, oldest):
            return scheduler.intake.fenced_off(stage_index, oldest)
        case Claimed(store, _, _, keys):
            return scheduler.intake.store_claimed(store, keys)
        case Replicated(store, _, batch, failed):
            return scheduler.intake.replicated(store, batch, failed)
        case Located(store, _, sequence_id, attempt, held):
            return scheduler.intake.located(sequence_id, attempt, store, held)
        case Pulled(_, sequence_id, attempt, intact):
            return scheduler.intake.pulled(sequence_id, attempt, intact)
    assert_never(event)


def _handoff_ended(scheduler: TokenScheduler, ended: HandoffEnded) -> list[Action]:
    if ended.error is not None:
        logger.warning("hand-off of %s failed: %s", ended.sequence_id, ended.error)
    return scheduler.intake.handoff_ended(
        ended.sequence_id,
        ended.attempt,
        ended.stage_index,
        ended.num_stages,
        ended.error is not None,
        ended.unconfirmed,
    )
