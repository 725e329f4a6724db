"""How a sequence gets its KV (pure): blocks are lent, then a prompt pipeline computes it or a store has a replica."""

from __future__ import annotations

from collections.abc import Mapping

from common.messages import Drawn
from common.replica_messages import HeldReplica
from services.token_stage.sequence import (
    Action,
    AskStore,
    Grant,
    Phase,
    PullReplica,
    Sequence,
    StopPrefill,
)
from services.token_stage.table import SequenceTable

MAX_LOCAL_TOKENS = 32
"""What a replica lacks is computed in the token pipeline itself up to so many tokens: more would hold up the others."""


class Intake:
    """Events of queued and prefilling sequences; each returns what there is to do."""

    def __init__(self, table: SequenceTable) -> None:
        self._table = table
        self._missing_stages: set[str] = set()
        """incarnations of stages of ours that are dead"""

    # ------------------------------------------------------------ our own stages

    def stage_lost(self, incarnation: str) -> None:
        """A stage of ours is dead. Until the next epoch, or until it is back, no prompt could be handed off: nothing is
        granted, or prompts would be computed again and again, in vain."""
        self._missing_stages.add(incarnation)

    def stage_back(self, incarnation: str) -> list[Action]:
        """It had been taken for dead, and lives."""
        self._missing_stages.discard(incarnation)
        return self.grant_waiting()

    # ------------------------------------------------------------ prompt pipelines

    def first_token(self, sequence_id: str, attempt: int, drawn: Drawn, num_computed: int) -> list[Action]:
        """The prompt pipeline drew the next token, for which it computed so many; it is delivered now and decoding
        starts with the KV."""
        sequence = self._table.current(sequence_id, attempt)
        if sequence is None or sequence.first is not None:
            return []
        self._count_recomputed(sequence, sequence.num_lost - (len(sequence.tokens) - num_computed))
        sequence.first = drawn
        actions = self._table.append(sequence, drawn)
        self._start_decoding_if_complete(sequence)
        return [*actions, *self.grant_waiting()]

    def kv_confirmed(
        self, sequence_id: str, attempt: int, layers: tuple[int, int], tokens: tuple[int, int], intact: bool
    ) -> list[Action]:
        """A stage verified (or found corrupt) these tokens of these layers of a hand-off. Of each layer they come in
        order."""
        sequence = self._table.current(sequence_id, attempt)
        if sequence is None or sequence.requeue:
            return []
        if not intact or not sequence.confirm(layers, tokens):
            return [*self.restart(sequence), *self.grant_waiting()]
        num_computed = min(sequence.confirmed)
        if num_computed > sequence.num_computed:
            sequence.num_computed = num_computed
            self._table.replication.computed(sequence)
        self._start_decoding_if_complete(sequence)
        return []

    def handoff_ended(
        self,
        sequence_id: str,
        attempt: int,
        stage_index: int,
        num_stages: int,
        failed: bool,
        unconfirmed: Mapping[str, int] | None = None,
    ) -> list[Action]:
        """A prompt stage will write nothing more for this attempt. What it wrote may arrive late until what is
        `unconfirmed` has been fenced off."""
        sequence = self._table.sequences.get(sequence_id)
        if sequence is None or sequence.attempt != attempt:
            return []
        if unconfirmed:
            self._fence(sequence, unconfirmed)
        sequence.num_writers = num_stages
        sequence.ended_writers.add(stage_index)
        actions: list[Action] = []
        if len(sequence.ended_writers) == num_stages:
            sequence.awaits_writers = False
            # the driver, one of them, would have sent the token before: the prompt was given up
            failed = failed or sequence.first is None
        if failed and sequence.phase is Phase.PREFILLING:
            actions = self.restart(sequence)
        self._table.release_if_untouched(sequence)
        return [*actions, *self.grant_waiting()]

    def is_granted(self, sequence_id: str, attempt: int) -> bool:
        """Whether the sequence still wants the prefill of this attempt."""
        return self._table.current(sequence_id, attempt) is not None

    def assign_writer(self, sequence_id: str, pipeline: str, epoch: int) -> None:
        """Notes which prompt pipeline (at which epoch) was asked to prefill a granted sequence."""
        self._table.sequences[sequence_id].writer = (pipeline, epoch)

    def compute_here(self, sequence_id: str) -> None:
        """A granted sequence has outgrown what a prompt pipeline holds; no writer was asked."""
        sequence = self._table.sequences[sequence_id]
        sequence.awaits_writers = False
        self._compute(sequence)

    def writer(self, sequence_id: str) -> tuple[str, int] | None:
        """The prompt pipeline and epoch that were asked to prefill a sequence."""
        sequence = self._table.sequences.get(sequence_id)
        return None if sequence is None else sequence.writer

    def pipeline_replaced(self, pipeline: str, epoch: int) -> list[Action]:
        """A prompt pipeline runs a new epoch: what its older epochs had not finished is prefilled again. A stage of it
        may have told us that its hand-off was over, and died before it told ours what to confirm."""
        self._table.fences.ask({pipeline: epoch})
        for sequence in list(self._table.sequences.values()):
            writer = sequence.writer
            has_begun = sequence.awaits_writers or sequence.ended_writers
            if not has_begun or writer is None or writer[0] != pipeline or writer[1] >= epoch:
                continue
            if sequence.awaits_writers:
                sequence.awaits_writers = False
                self._fence(sequence, {pipeline: epoch})
            if sequence.phase is Phase.PREFILLING and not self._is_complete(sequence):
                sequence.requeue = True
            self._table.release_if_untouched(sequence)
        return self.grant_waiting()

    def fenced_off(self, stage_index: int, oldest: Mapping[str, int]) -> list[Action]:
        """Nothing of older epochs changes this stage's pool any more."""
        self._table.fences.confirm(stage_index, oldest)
        for need in self._table.allocator.quarantines:
            if isinstance(need, frozenset) and self._table.fences.holds(need):
                self._table.allocator.release_quarantine(need)
        return self.grant_waiting()

    def _fence(self, sequence: Sequence, oldest: Mapping[str, int]) -> None:
        """Its blocks are safe only once this has been fenced off."""
        self._table.fences.ask(oldest)
        sequence.need |= set(oldest.items())

    def restart(self, sequence: Sequence) -> list[Action]:
        """Its prefill is void: stop the writers, then prefill again."""
        if sequence.requeue:
            return []
        sequence.requeue = True
        stop: list[Action] = [StopPrefill(sequence.sequence_id, sequence.attempt)]
        self._table.release_if_untouched(sequence)
        return stop

    def _is_complete(self, sequence: Sequence) -> bool:
        return sequence.first is not None and sequence.num_computed == len(sequence.tokens) - 1

    def _start_decoding_if_complete(self, sequence: Sequence) -> None:
        is_prefilling = sequence.phase is Phase.PREFILLING and not sequence.requeue
        if is_prefilling and self._is_complete(sequence):
            self._table.set_ready(sequence)

    # ------------------------------------------------------------ stores

    def store_lost(self, name: str) -> list[Action]:
        """A store is gone: who waits for its answer is prefilled."""
        self._no_longer_read(self._table.replication.store_lost(name))
        delivered = self._deliver_all()
        waiting = [s for s in self._table.sequences.values() if s.source == name and s.is_asking and not s.is_leaving]
        actions = [action for s in waiting for action in self._prefill(s)]
        return [*delivered, *actions, *self.grant_waiting()]

    def store_claimed(self, name: str, keys: list[str]) -> list[Action]:
        """A store reads nothing of older epochs any more."""
        self._table.replication.claimed(name, keys)
        return [*self._deliver_all(), *self.grant_waiting()]

    def replicated(self, name: str, batch: int, failed: list[str]) -> list[Action]:
        """A store has read what it was told to."""
        read = self._table.replication.replicated(name, batch, failed)
        delivered = [action for sequence in read for action in self._table.deliver(sequence)]
        self._no_longer_read(read)
        return [*delivered, *self.grant_waiting()]

    def located(self, sequence_id: str, attempt: int, store: str, held: HeldReplica | None) -> list[Action]:
        """A store's answer."""
        sequence = self._table.current(sequence_id, attempt)
        if sequence is None or sequence.source != store or not sequence.is_asking or sequence.requeue:
            return []
        if held is None or len(sequence.tokens) < 2:
            return self._prefill(sequence)
        sequence.replica, sequence.num_pulls = held, self._table.shape.num_stages
        return [PullReplica(sequence_id)]

    def pulled(self, sequence_id: str, attempt: int, intact: bool) -> list[Action]:
        """A stage has copied its part of a replica; when all have, the sequence goes on behind it."""
        sequence = self._table.sequences.get(sequence_id)
        if sequence is None or sequence.attempt != attempt or not sequence.num_pulls:
            return []
        sequence.num_pulls -= 1
        if not intact:
            sequence.replica = None
        if sequence.num_pulls:
            return []
        if sequence.is_leaving:
            self._table.release_if_untouched(sequence)
            return self.grant_waiting()
        if sequence.replica is None:
            return self._prefill(sequence)
        return self._go_on_behind(sequence, sequence.replica)

    def _go_on_behind(self, sequence: Sequence, held: HeldReplica) -> list[Action]:
        """What a replica lacks is computed here if it is little."""
        start = min(held.num_tokens, len(sequence.tokens) - 1)
        sequence.num_computed = sequence.num_scheduled = start
        sequence.confirmed = [start] * self._table.shape.num_layers
        if not sequence.was_preempted:
            self._table.costs.recoveries += 1
        self._table.replication.restored(sequence, sequence.source)
        if self._table.shape.is_colocated or len(sequence.tokens) - start <= MAX_LOCAL_TOKENS:
            return self._compute(sequence)
        return [self._grant(sequence, held)]

    def _compute(self, sequence: Sequence) -> list[Action]:
        """What has no KV yet is computed by our own stages."""
        self._count_recomputed(sequence, sequence.num_lost - sequence.num_scheduled)
        self._table.prefilling[sequence.sequence_id] = sequence
        return []

    def _count_recomputed(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens that had KV before: lost by a failure, or given up for others."""
        if sequence.was_preempted:
            self._table.costs.recomputed_after_preemption_tokens += max(0, num_tokens)
        else:
            self._table.costs.recomputed_tokens += max(0, num_tokens)
            sequence.num_recomputed += max(0, num_tokens)
            self._table.most_recomputed_tokens = max(self._table.most_recomputed_tokens, sequence.num_recomputed)

    def _deliver_all(self) -> list[Action]:
        """What the stores that there are now allow."""
        return [action for sequence in self._table.sequences.values() for action in self._table.deliver(sequence)]

    def _no_longer_read(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._table.release_if_untouched(sequence)

    # ------------------------------------------------------------ grants

    def grant_waiting(self) -> list[Action]:
        """Lends blocks to queued sequences, oldest first, while they fit beside a reserve for the running."""
        actions: list[Action] = []
        if self._missing_stages or not self._table.replication.is_settled:
            return actions
        for sequence in sorted(self._table.waiting.values(), key=lambda sequence: sequence.arrival):
            if sequence.is_orphan:
                continue
            needed = self._table.blocks_for(len(sequence.tokens) + 1)
            reserve = self._table.num_decoding // 4 if self._table.num_running else 0
            while self._table.allocator.num_free < needed + reserve and self._table.requeue_orphan():
                pass
            if self._table.allocator.num_free < needed + reserve:
                break
            expected = self._table.blocks_for(sequence.num_prompt + sequence.params.max_tokens)
            blocks = self._table.allocator.allocate(sequence.sequence_id, needed, max(needed, expected))
            if blocks is None:
                break
            actions += self._begin_prefill(sequence, list(blocks))
        return actions

    def _begin_prefill(self, sequence: Sequence, blocks: list[int]) -> list[Action]:
        del self._table.waiting[sequence.sequence_id]
        sequence.phase = Phase.PREFILLING
        sequence.attempt += 1
        sequence.blocks = blocks
        sequence.num_lost = max(sequence.num_computed, len(sequence.tokens) if sequence.num_output else 0)
        sequence.num_scheduled = sequence.num_computed = 0
        sequence.first = sequence.num_writers = sequence.replica = None
        sequence.ended_writers.clear()
        sequence.confirmed = [0] * self._table.shape.num_layers
        store = self._table.replication.holder(sequence, is_continued=sequence.num_output > 0)
        if store is not None:
            sequence.source = store
            return [AskStore(sequence.sequence_id, store)]
        return self._prefill(sequence)

    def _prefill(self, sequence: Sequence) -> list[Action]:
        """Its KV is computed from token 0."""
        sequence.source, sequence.replica = "", None
        return self._compute(sequence) if self._table.shape.is_colocated else [self._grant(sequence)]

    def _grant(self, sequence: Sequence, held: HeldReplica | None = None) -> Grant:
        sequence.awaits_writers = True
        forced = sequence.tokens[sequence.num_prompt :]
        return Grant(sequence.sequence_id, sequence.attempt, sequence.blocks, forced, sequence.source, held)
