"""The sequences of one token pipeline and their blocks: how they become ready, end, and give their blocks back (pure).

Blocks are given away only when nothing can touch them: no step in flight uses them, no store reads them, no stage
copies a replica into them, and every prompt stage that was granted them has said that it will not write again, or has
been fenced off. Until then they are quarantined: their sequence goes on without them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from common.ends import finish_reason
from common.kv.blocks import BlockAllocator
from common.messages import Drawn
from common.replica_messages import replica_key
from services.token_stage.fences import Fences
from services.token_stage.replication import Replication
from services.token_stage.sequence import Action, Phase, Produce, Sequence, StopPrefill
from services.token_stage.swapping import DeviceTier

MAX_FINISHED = 256


@dataclass(slots=True)
class Costs:
    """What failures have cost, and what too few blocks have. Counters of `status`."""

    recoveries: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    recomputed_after_preemption_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineShape:
    """What a token pipeline is in one epoch. A colocated one prefills by itself; any other computes only what a replica
    lacks, in chunks of at most `chunk_tokens`, too."""

    epoch: int
    num_stages: int
    num_layers: int
    num_blocks: int
    block_size: int
    eos_token_ids: tuple[int, ...]
    chunk_tokens: int
    is_colocated: bool
    durability: str = "async"


class SequenceTable:
    """State of one token pipeline at one epoch. With a `device` the blocks are those of the stages' host pools, and
    steps take what their devices can hold."""

    def __init__(self, shape: PipelineShape, replication: Replication, device: DeviceTier | None = None) -> None:
        self.shape = shape
        self.replication = replication
        self.device = device
        self.fences = Fences(shape.num_stages)
        self.costs = Costs()
        self.most_recomputed_tokens = 0
        """of one sequence, after failures"""
        self.allocator = BlockAllocator(shape.num_blocks)
        self.max_sequence_blocks = shape.num_blocks if device is None else min(shape.num_blocks, device.num_blocks)
        self.sequences: dict[str, Sequence] = {}
        self.by_key: dict[str, Sequence] = {}
        """the same, by what a request's next router will ask for"""
        self.finished: OrderedDict[str, Sequence] = OrderedDict()
        """the last that finished, by key: their routers may have died before they passed on the end"""
        self.waiting: dict[str, Sequence] = {}
        """for blocks"""
        self.ready: OrderedDict[str, Sequence] = OrderedDict()
        """their next token can be computed"""
        self.prefilling: dict[str, Sequence] = {}
        """our own stages compute what has no KV yet"""
        self.closes: list[str] = []
        """what stages do not know yet of sequences that have gone"""
        self.num_decoding = 0

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        return len(self.sequences) - len(self.waiting)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that the KV of so many tokens takes."""
        return -(-num_tokens // self.shape.block_size)

    def current(self, sequence_id: str, attempt: int) -> Sequence | None:
        """The sequence, if its KV is being built, and by this attempt."""
        sequence = self.sequences.get(sequence_id)
        if sequence is None or sequence.attempt != attempt or sequence.phase is not Phase.PREFILLING:
            return None
        return sequence

    def set_ready(self, sequence: Sequence) -> None:
        """Its next token can be computed; an orphan's is not."""
        if sequence.phase is not Phase.DECODING:
            sequence.phase = Phase.DECODING
            self.num_decoding += 1
        if not sequence.is_orphan:
            self.ready[sequence.sequence_id] = sequence

    def append(self, sequence: Sequence, drawn: Drawn) -> list[Action]:
        """Its next token has been drawn, perhaps its last."""
        sequence.tokens.append(drawn.token_id)
        num_output = sequence.num_output
        reason = finish_reason(sequence.params, self.shape.eos_token_ids, drawn.token_id, num_output)
        sequence.undelivered.append(Produce(sequence.sequence_id, num_output - 1, drawn, reason))
        delivered = self.deliver(sequence)
        if reason is None:
            return delivered
        self.finished[replica_key(sequence.sequence_id)] = sequence
        if len(self.finished) > MAX_FINISHED:
            self.finished.popitem(last=False)
        return [*delivered, *self.end(sequence)]

    def deliver(self, sequence: Sequence) -> list[Action]:
        """Tokens that need not wait (any more) for a store, or for a router. The last one never waits for a store:
        after it nothing can be lost."""
        if sequence.is_orphan:
            return []
        count = 0
        for produced in sequence.undelivered:
            position = sequence.num_prompt + produced.index
            if not self._may_deliver(sequence, position):
                break
            count += 1
        delivered, sequence.undelivered = sequence.undelivered[:count], sequence.undelivered[count:]
        sequence.shown.extend(delivered)
        return list(delivered)

    def _may_deliver(self, sequence: Sequence, position: int) -> bool:
        if sequence.undelivered[-1].finish_reason is not None:
            return True
        is_strict = sequence.params.durability_strict
        if is_strict and not self.replication.num_stores:
            return False
        return sequence.max_lag is None or self.replication.protects(
            sequence, position, sequence.max_lag, is_strict=is_strict
        )

    def requeue(self, sequence: Sequence) -> None:
        """Takes its blocks, for others."""
        self.ready.pop(sequence.sequence_id, None)
        sequence.requeue = sequence.was_preempted = True
        self.costs.preemptions += 1
        self.release_if_untouched(sequence)

    def requeue_orphan(self) -> bool:
        """Takes its blocks from a sequence that nobody reads at present; False: there is none."""
        decoding = (s for s in self.sequences.values() if s.phase is Phase.DECODING and not s.requeue)
        orphan = next((sequence for sequence in decoding if sequence.is_orphan), None)
        if orphan is not None:
            self.requeue(orphan)
        return orphan is not None

    def end(self, sequence: Sequence, *, is_superseded: bool = False) -> list[Action]:
        """Nobody wants its tokens any more; with `is_superseded` another one has the same key from now on."""
        if sequence.phase is Phase.ENDED:
            return []
        self.replication.ended(sequence, is_superseded=is_superseded)
        was = sequence.phase
        if was is Phase.DECODING:
            self.num_decoding -= 1
        sequence.phase = Phase.ENDED
        self.ready.pop(sequence.sequence_id, None)
        self.prefilling.pop(sequence.sequence_id, None)
        self.waiting.pop(sequence.sequence_id, None)
        wants_stop = was is Phase.PREFILLING and sequence.awaits_writers
        stop: list[Action] = [StopPrefill(sequence.sequence_id, sequence.attempt)] if wants_stop else []
        self.release_if_untouched(sequence)
        return stop

    def release_if_untouched(self, sequence: Sequence) -> None:
        """Call whenever somebody has let go of it: if it was the last, its blocks go back, and it with them or into the
        queue."""
        if not sequence.is_leaving or sequence.is_touched:
            return
        self._give_back(sequence)
        if sequence.is_open:
            self.closes.append(sequence.sequence_id)
            sequence.is_open = False
        if sequence.phase is Phase.ENDED:
            self.sequences.pop(sequence.sequence_id, None)
            if self.by_key.get(replica_key(sequence.sequence_id)) is sequence:
                del self.by_key[replica_key(sequence.sequence_id)]
        else:
            self._back_to_queue(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        """Its blocks, unless somebody may still write to them."""
        need, sequence.need = sequence.need, frozenset()
        if not sequence.blocks:
            return
        if self.fences.holds(need):
            self.allocator.release(sequence.sequence_id)
        else:
            self.allocator.quarantine(sequence.sequence_id, need)
        sequence.blocks = []

    def _back_to_queue(self, sequence: Sequence) -> None:
        sequence.requeue = False
        if sequence.phase is Phase.DECODING:
            self.num_decoding -= 1
        self.prefilling.pop(sequence.sequence_id, None)
        sequence.phase = Phase.WAITING
        self.waiting[sequence.sequence_id] = sequence
