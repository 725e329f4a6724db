"""Which prompt pipeline a token driver asks for a prompt (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from common.handoff_messages import Handoff
from common.kv.token_ids import ID_BYTES
from common.membership import MemberRecord, PipelineRecord
from common.messages import Admit, PipelineReady, Prefill, pack_ids
from services.token_stage.sequence import Grant

LEAVE_S = 2.0
"""So long prompts wait for a pipeline that has lost a stage, if there is another: weights may take minutes to load."""


class PromptPipelines:
    """What is known of them."""

    def __init__(self) -> None:
        self._ready: dict[str, PipelineReady] = {}
        """what each last said of itself"""
        self._left: dict[str, int] = {}
        """in which epoch each was last left, whatever it says of that"""

    def reported(self, ready: PipelineReady) -> None:
        """It says so again and again: of its epochs the newest counts."""
        known = self._ready.get(ready.pipeline)
        if ready.epoch > self._left.get(ready.pipeline, 0) and (known is None or ready.epoch >= known.epoch):
            self._ready[ready.pipeline] = ready

    def pick(self, wanted: str, records: Mapping[str, PipelineRecord]) -> PipelineRecord | None:
        """One that works, of these the one that the router chose, if there is any."""
        able = [r for r in records.values() if r.role == "prompt_stage" and r.successor is None]
        return max(
            able,
            key=lambda r: (self.epoch(r) > 0, r.pipeline == wanted, self.capacity_tokens(r.pipeline) or 0),
            default=None,
        )

    def over(self, pipeline: str) -> None:
        """This one is over."""
        self._ready.pop(pipeline, None)

    def leave(self, lost: MemberRecord, records: Mapping[str, PipelineRecord]) -> PipelineRecord | None:
        """A prompt stage was lost some time ago. Its pipeline, if that is not back and what it was asked for had better
        be asked of another."""
        record = records.get(str(lost.pipeline))
        if record is None or all(stage.incarnation != lost.incarnation for stage in record.stages):
            return None
        self._left[record.pipeline] = record.epoch
        if self.epoch(record):
            del self._ready[record.pipeline]
        has_other = any(r.role == "prompt_stage" and r.successor is None and self.epoch(r) for r in records.values())
        return record if has_other and record.successor is None else None

    def capacity_tokens(self, pipeline: str) -> int | None:
        """How long a prompt it can compute; None: it has not said that it is ready."""
        ready = self._ready.get(pipeline)
        return None if ready is None else ready.capacity_tokens

    def epoch(self, record: PipelineRecord) -> int:
        """As which it is asked. 0, which it refuses, where what was published last and what has said that it is ready
        are not of the same epoch: who would be asked may be dead. All is asked again when they are."""
        ready = self._ready.get(record.pipeline)
        return record.epoch if ready is not None and ready.epoch == record.epoch else 0

    def prefill(self, record: PipelineRecord, admit: Admit, grant: Grant, handoff: tuple[str, int]) -> Prefill:
        """The work for it; `handoff` names the token pipeline and its epoch."""
        start = 0 if grant.held is None else grant.held.num_tokens
        return Prefill(
            self.epoch(record),
            grant.sequence_id,
            grant.attempt,
            admit.choice,
            len(admit.prompt) // ID_BYTES,
            admit.prompt + pack_ids(grant.forced),
            admit.params,
            Handoff(*handoff, grant.blocks, start),
            grant.held_by,
            grant.held,
        )
