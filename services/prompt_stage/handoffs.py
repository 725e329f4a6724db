"""What a prompt stage hands off, and whom it tells: the messages around DéjàVuLib's `HandoffWriter`.

Every layer of every step is submitted as soon as it exists. When all layers of a chunk that a token stage owns are in
its pool, that stage gets `KvArrived`. When a sequence is closed and all of its writes are over, the token driver hears
that nothing more comes (`HandoffEnded`), and our own that nothing reads its blocks any more; no step waits for that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from common.handoff_messages import HandoffEnded, KvArrived
from common.kv.checksum import hash_tokens
from common.kv.choice import restricted
from common.kv.errors import LinkError
from common.kv.fence import Authority
from common.kv.offer import GrantOffer
from common.kv.pool import KvPool
from common.kv.stream import Arrival, HandoffSpan, HandoffWriter
from common.membership import PipelineRecord
from common.messages import Message, SequenceOpen, Step, pack_ids
from common.stage.worker import StageSequence
from dejavu.errors import ProtocolError

logger = logging.getLogger(__name__)

Send = Callable[[str, Message], bool]


class Handoffs:
    """All hand-offs of one prompt stage. `start` it on the event loop; `submit` and `drain` belong to the compute
    thread."""

    def __init__(
        self, pipeline: str, incarnation: str, stage_index: int, num_stages: int, link: str, send: Send
    ) -> None:
        self._pipeline = pipeline
        self._incarnation = incarnation
        self._epoch = 0
        self._stage_index = stage_index
        self._num_stages = num_stages
        self._link = link
        self._send = send
        self._records: dict[str, PipelineRecord] = {}
        self._connected: dict[str, int] = {}
        self._writer: HandoffWriter

    async def start(self, pool: KvPool) -> None:
        self._writer = await HandoffWriter.start(pool, self._on_arrival)

    async def reset(self, epoch: int) -> None:
        """What an older epoch of our own pipeline had not handed off is dropped. Token stages refuse whatever would
        still come of it."""
        self._epoch = epoch
        await self._writer.reset({self._pipeline: epoch})

    async def aclose(self) -> None:
        await self._writer.aclose()

    async def attach(self, record: PipelineRecord) -> None:
        """What is handed off to a token pipeline goes to its stages of this epoch; nothing more to those of an older
        one, or to one that is over. Waits for nobody."""
        known = self._records.get(record.pipeline)
        self._records[record.pipeline] = record
        if known is not None:
            await self._writer.attach(_destination(known.pipeline, known.epoch), [])
        try:
            await self._writer.attach(*self._way(record))
        except ProtocolError as error:
            logger.warning("links to %s: %s", record.pipeline, error)
        self._connected[record.pipeline] = record.epoch

    async def open(self, record: PipelineRecord) -> None:
        """Opens the links ahead of the first write."""
        if self.epoch_of(record.pipeline) != record.epoch or not self._epoch:
            return
        try:
            await self._writer.connect(*self._way(record))
        except (LinkError, ProtocolError) as error:
            logger.warning("links to %s: %s", record.pipeline, error)
        logger.info("links to %s: %s", record.pipeline, ", ".join(self._links_to(record)))

    def _way(self, record: PipelineRecord) -> tuple[str, list[GrantOffer], Authority]:
        """Raises `ProtocolError`."""
        stages = record.stages if record.successor is None else ()
        offers = [GrantOffer.decode(str(stage.detail.get("kv_offer", ""))) for stage in stages]
        authority = {record.pipeline: record.epoch, self._pipeline: self._epoch, self._incarnation: 0}
        return _destination(record.pipeline, record.epoch), [restricted(o, self._link) for o in offers], authority

    def epoch_of(self, pipeline: str) -> int:
        """The epoch that we have links for; those of older ones are closed."""
        return self._connected.get(pipeline, 0)

    def submit(self, spans: list[HandoffSpan], local_layer: int) -> None:
        """A layer's KV of these spans is in our pool."""
        for span in spans:
            self._writer.submit(span, local_layer)

    def spans(self, step: Step, sequences: Mapping[str, StageSequence]) -> list[HandoffSpan]:
        """What a step's chunks hand off; a sequence's first one with everything that was in our pool before."""
        spans = []
        opened_now = {opened.sequence_id for opened in step.opens}
        for work in step.chunks:
            sequence = sequences[work.sequence_id]
            handoff = sequence.opened.handoff
            if handoff is None or handoff.epoch < self.epoch_of(handoff.pipeline):
                continue  # nobody waits for it
            is_first = work.sequence_id in opened_now
            start = handoff.start if is_first else max(work.start, handoff.start)
            end = work.start + work.num_tokens
            if start >= end:
                continue  # the token stages have it already
            spans.append(
                HandoffSpan(
                    work.sequence_id,
                    sequence.opened.attempt,
                    _destination(handoff.pipeline, handoff.epoch),
                    (start, end),
                    sequence.blocks,
                    handoff.blocks,
                    hash_tokens(pack_ids(sequence.tokens[:end])),
                )
            )
        return spans

    def drain(self, opened: SequenceOpen) -> Future[LinkError | None]:
        """Done when nothing reads the sequence's blocks any more, with what `ended` wants to know."""
        return self._writer.drain(opened.sequence_id, opened.attempt)

    def ended(self, opened: SequenceOpen, error: LinkError | None) -> None:
        """Tells the token driver that nothing more comes, unless its pipeline runs another epoch by now."""
        handoff = opened.handoff
        record = None if handoff is None else self._records.get(handoff.pipeline)
        if handoff is None or record is None or record.epoch != handoff.epoch:
            return
        ended = HandoffEnded(
            handoff.epoch,
            opened.sequence_id,
            opened.attempt,
            self._stage_index,
            self._num_stages,
            None if error is None else str(error),
            {} if error is None else dict(error.unconfirmed),
        )
        self._send(record.stages[0].name, ended)

    def stats(self) -> dict[str, object]:
        """Links in use and bytes sent, for `status`."""
        names = {name for record in self._records.values() for name in self._links_to(record)}
        return {"link": ",".join(sorted(names)), "handoff": {"sent_bytes": self._writer.sent_bytes}}

    def _on_arrival(self, arrival: Arrival) -> None:
        pipeline, _, epoch = arrival.destination.rpartition("@")
        record = self._records.get(pipeline)
        if record is None or record.epoch != int(epoch):
            return
        arrived = KvArrived(
            record.epoch,
            arrival.sequence_id,
            arrival.attempt,
            arrival.layers,
            arrival.start,
            arrival.num_tokens,
            list(arrival.blocks),
            arrival.token_hash,
            arrival.checksum,
        )
        self._send(record.stages[arrival.stage_index].name, arrived)

    def _links_to(self, record: PipelineRecord) -> list[str]:
        names = self._writer.links(_destination(record.pipeline, record.epoch))
        return [name for name in names if name is not None]


def _destination(pipeline: str, epoch: int) -> str:
    return f"{pipeline}@{epoch}"
