"""The driver of a token pipeline decides here (pure): who gets blocks, what the next step computes, who is
preempted, when a sequence ends. Events come in as method calls and return actions; `next_step` forms microbatches.

Blocks are given away only when nothing can touch them: no step in flight reads them and every prompt stage that
was granted them has said that it will not write again.
"""

from __future__ import annotations

from collections import OrderedDict

from common.ends import finish_reason
from common.kv.blocks import BlockAllocator
from common.messages import ChunkWork, Drawn, SequenceOpen, Step, pack_ids
from common.stage.prefill_plan import PendingPrompt, plan_chunk
from dejavu.params import SamplingParams
from dejavu.wire import WireError
from services.token_stage.sequence import (
    Action,
    Fail,
    FlyingStep,
    Grant,
    Phase,
    Produce,
    Sequence,
    StopPrefill,
)

MAX_SEQUENCES_PER_STEP = 256


class TokenScheduler:
    """State of one token pipeline at one epoch. `chunk_tokens` > 0 makes it colocated: it prefills by itself."""

    def __init__(
        self,
        *,
        epoch: int,
        num_stages: int,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        eos_token_ids: tuple[int, ...],
        chunk_tokens: int = 0,
    ) -> None:
        self.epoch = epoch
        self.allocator = BlockAllocator(num_blocks)
        self._num_stages = num_stages
        self._num_layers = num_layers
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._eos_token_ids = eos_token_ids
        self._chunk_tokens = chunk_tokens
        self._sequences: dict[str, Sequence] = {}
        self._waiting: dict[str, Sequence] = {}
        self._ready: OrderedDict[str, Sequence] = OrderedDict()
        self._prefilling: dict[str, Sequence] = {}
        self._opens: list[SequenceOpen] = []
        self._closes: list[str] = []
        self._flying: dict[int, FlyingStep] = {}
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_decoding = 0

    # ------------------------------------------------------------ events

    def admit(
        self, sequence_id: str, choice: int, prompt: list[int], forced: list[int], params: SamplingParams
    ) -> list[Action]:
        """Queues a sequence; a known id is ignored (the router may repeat itself)."""
        if sequence_id in self._sequences:
            return []
        needed = self._blocks_for(len(prompt) + params.max_tokens)
        if needed > self._num_blocks:
            message = (
                f"prompt ({len(prompt)} tokens) and max_tokens ({params.max_tokens}) need {needed} KV blocks; "
                f"a token stage has {self._num_blocks} (raise --kv-memory or lower max_tokens)"
            )
            return [Fail(sequence_id, WireError("context_exceeded", message, "max_tokens"))]
        sequence = Sequence(sequence_id, choice, params, len(prompt), prompt + forced, self._num_arrivals)
        self._num_arrivals += 1
        self._sequences[sequence_id] = sequence
        self._waiting[sequence_id] = sequence
        return self._grant_waiting()

    def cancel(self, sequence_id: str) -> list[Action]:
        """Ends a sequence; its blocks return as soon as nothing touches them."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return []
        return [*self._end(sequence), *self._grant_waiting()]

    def first_token(self, sequence_id: str, attempt: int, drawn: Drawn) -> list[Action]:
        """The prompt pipeline drew the next token; it is delivered now and decoding starts with the KV."""
        sequence = self._current(sequence_id, attempt)
        if sequence is None or sequence.first is not None:
            return []
        sequence.first = drawn
        actions = self._append(sequence, drawn)
        return [*actions, *self._start_decoding_if_complete(sequence), *self._grant_waiting()]

    def kv_confirmed(self, sequence_id: str, attempt: int, num_cells: int, intact: bool) -> list[Action]:
        """A stage verified (or found corrupt) `num_cells` = tokens x layers of a hand-off."""
        sequence = self._current(sequence_id, attempt)
        if sequence is None:
            return []
        if not intact:
            return self._restart(sequence)
        sequence.num_cells += num_cells
        return self._start_decoding_if_complete(sequence)

    def handoff_ended(
        self, sequence_id: str, attempt: int, stage_index: int, num_stages: int, failed: bool
    ) -> list[Action]:
        """A prompt stage will write nothing more for this attempt."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.attempt != attempt:
            return []
        sequence.num_writers = num_stages
        sequence.ended_writers.add(stage_index)
        actions: list[Action] = []
        if len(sequence.ended_writers) == num_stages:
            sequence.awaits_writers = False
        if failed and sequence.phase is Phase.PREFILLING:
            actions = self._restart(sequence)
        self._release_if_untouched(sequence)
        return [*actions, *self._grant_waiting()]

    def assign_writer(self, sequence_id: str, pipeline: str, epoch: int) -> None:
        """Notes which prompt pipeline (at which epoch) was asked to prefill a granted sequence."""
        self._sequences[sequence_id].writer = (pipeline, epoch)

    def writer(self, sequence_id: str) -> tuple[str, int] | None:
        """The prompt pipeline and epoch that were asked to prefill a sequence."""
        sequence = self._sequences.get(sequence_id)
        return None if sequence is None else sequence.writer

    def pipeline_replaced(self, pipeline: str, epoch: int) -> list[Action]:
        """A prompt pipeline runs a new epoch: what its older epochs had not finished is prefilled again."""
        for sequence in list(self._sequences.values()):
            writer = sequence.writer
            if not sequence.awaits_writers or writer is None or writer[0] != pipeline or writer[1] >= epoch:
                continue
            sequence.awaits_writers = False
            complete = sequence.first is not None and sequence.num_cells == self._cells_needed(sequence)
            if sequence.phase is Phase.PREFILLING and not complete:
                sequence.requeue = True
            self._release_if_untouched(sequence)
        return self._grant_waiting()

    def step_done(self, step: int, drawn: list[Drawn]) -> list[Action]:
        """The last stage finished a step. Raises `KeyError` for a step that is not in flight."""
        flying = self._flying.pop(step)
        actions: list[Action] = []
        draws = iter(drawn)
        for chunk, sequence in zip(flying.step.chunks, flying.sequences, strict=True):
            sequence.num_in_flight -= 1
            token = next(draws) if chunk.draws else None
            if sequence.is_leaving:
                self._release_if_untouched(sequence)
            elif token is not None:
                self._prefilling.pop(sequence.sequence_id, None)
                actions += self._append(sequence, token)
                if not sequence.is_leaving:
                    self._set_ready(sequence)
        return [*actions, *self._grant_waiting()]

    # ------------------------------------------------------------ steps

    @property
    def num_flying(self) -> int:
        return len(self._flying)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._sequences) - len(self._waiting)

    def kv_blocks(self) -> dict[str, int]:
        """Blocks in all, free, and withdrawn because somebody might still write to them."""
        return {
            "total": self._num_blocks,
            "free": self.allocator.num_free,
            "quarantined": self.allocator.num_quarantined,
        }

    def next_step(self) -> Step | None:
        """The next microbatch, or None where nothing can run. Up to `num_stages` steps fly at once, each with its
        share of the sequences, so that no stage waits. An idle pipeline's last step only closes sequences."""
        if len(self._flying) >= self._num_stages:
            return None
        chunks, sequences = self._decode_chunks()
        if self._chunk_tokens:
            self._add_prefill_chunks(chunks, sequences)
        if not chunks and (self._flying or not self._closes):
            return None
        step = Step(self.epoch, self._num_steps, self._closes, self._opens, chunks)
        self._opens, self._closes = [], []
        self._flying[step.step] = FlyingStep(step, tuple(sequences))
        self._num_steps += 1
        return step

    def _decode_chunks(self) -> tuple[list[ChunkWork], list[Sequence]]:
        num_active = self._num_decoding
        share = min(MAX_SEQUENCES_PER_STEP, -(-num_active // self._num_stages))
        chunks: list[ChunkWork] = []
        sequences: list[Sequence] = []
        for sequence in list(self._ready.values()):
            if len(chunks) == share:
                break
            if sequence.sequence_id not in self._ready:  # preempted for one before it
                continue
            new_blocks = self._blocks_for_next(sequence)
            if new_blocks is None:
                continue
            del self._ready[sequence.sequence_id]
            start = len(sequence.tokens) - 1
            self._open(sequence)
            chunks.append(ChunkWork(sequence.sequence_id, start, 1, new_blocks, sequence.tokens[-1], draws=True))
            sequence.num_scheduled = start + 1
            sequence.num_in_flight += 1
            sequences.append(sequence)
        return chunks, sequences

    def _add_prefill_chunks(self, chunks: list[ChunkWork], sequences: list[Sequence]) -> None:
        pending = [
            PendingPrompt(s.sequence_id, len(s.tokens) - s.num_scheduled, s.arrival)
            for s in self._prefilling.values()
            if s.num_scheduled < len(s.tokens)
        ]
        for sequence_id, num_tokens in plan_chunk(pending, self._chunk_tokens - len(chunks)):
            sequence = self._prefilling[sequence_id]
            self._open(sequence)
            start = sequence.num_scheduled
            draws = start + num_tokens == len(sequence.tokens)
            chunks.append(ChunkWork(sequence_id, start, num_tokens, [], None, draws))
            sequence.num_scheduled += num_tokens
            sequence.num_in_flight += 1
            sequences.append(sequence)

    def _open(self, sequence: Sequence) -> None:
        if sequence.is_open:
            return
        sequence.is_open = True
        self._opens.append(
            SequenceOpen(
                sequence.sequence_id,
                sequence.attempt,
                sequence.choice,
                sequence.num_prompt,
                pack_ids(sequence.tokens),
                sequence.params,
                list(sequence.blocks),
            )
        )

    # ------------------------------------------------------------ blocks

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _blocks_for_next(self, sequence: Sequence) -> list[int] | None:
        """Blocks that the sequence's next token needs on top of its own; None: it has to wait."""
        missing = self._blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        if missing <= 0:
            return []
        while (extra := self.allocator.extend(sequence.sequence_id, missing)) is None:
            if not self._preempt_youngest(sequence):
                return None
        sequence.blocks += extra
        return list(extra) if sequence.is_open else []

    def _preempt_youngest(self, needy: Sequence) -> bool:
        """Frees the blocks of the youngest ready sequence younger than `needy`; False: there is none (then an
        older one, or one in flight, will make room)."""
        victim = max(self._ready.values(), key=lambda sequence: sequence.arrival, default=None)
        if victim is None:
            return False
        if victim is needy and len(self._sequences) - len(self._waiting) == 1:
            raise AssertionError("a sequence that fits alone found no block")
        self._requeue(victim)
        return victim is not needy

    def _grant_waiting(self) -> list[Action]:
        """Lends blocks to queued sequences, oldest first, while they fit beside a reserve for the running."""
        actions: list[Action] = []
        for sequence in sorted(self._waiting.values(), key=lambda sequence: sequence.arrival):
            needed = self._blocks_for(len(sequence.tokens) + 1)
            reserve = self._num_decoding // 4 if len(self._sequences) > len(self._waiting) else 0
            if self.allocator.num_free < needed + reserve:
                break
            expected = self._blocks_for(sequence.num_prompt + sequence.params.max_tokens)
            blocks = self.allocator.allocate(sequence.sequence_id, needed, max(needed, expected))
            if blocks is None:
                break
            actions += self._begin_prefill(sequence, list(blocks))
        return actions

    def _begin_prefill(self, sequence: Sequence, blocks: list[int]) -> list[Action]:
        del self._waiting[sequence.sequence_id]
        sequence.phase = Phase.PREFILLING
        sequence.attempt += 1
        sequence.blocks = blocks
        sequence.num_scheduled = sequence.num_cells = 0
        sequence.first, sequence.num_writers = None, None
        sequence.ended_writers.clear()
        if self._chunk_tokens:
            self._prefilling[sequence.sequence_id] = sequence
            return []
        sequence.awaits_writers = True
        forced = sequence.tokens[sequence.num_prompt :]
        return [Grant(sequence.sequence_id, sequence.attempt, blocks, forced)]

    # ------------------------------------------------------------ transitions

    def _current(self, sequence_id: str, attempt: int) -> Sequence | None:
        sequence = self._sequences.get(sequence_id)
        if sequence is None or sequence.attempt != attempt or sequence.phase is not Phase.PREFILLING:
            return None
        return sequence

    def _cells_needed(self, sequence: Sequence) -> int:
        num_tokens = len(sequence.tokens) - (1 if sequence.first is not None else 0)
        return num_tokens * self._num_layers

    def _start_decoding_if_complete(self, sequence: Sequence) -> list[Action]:
        is_prefilling = sequence.phase is Phase.PREFILLING and not sequence.requeue
        if is_prefilling and sequence.first is not None and sequence.num_cells == self._cells_needed(sequence):
            self._set_ready(sequence)
        return []

    def _set_ready(self, sequence: Sequence) -> None:
        if sequence.phase is not Phase.DECODING:
            sequence.phase = Phase.DECODING
            self._num_decoding += 1
        self._ready[sequence.sequence_id] = sequence

    def _append(self, sequence: Sequence, drawn: Drawn) -> list[Action]:
        sequence.tokens.append(drawn.token_id)
        num_output = sequence.num_output
        reason = finish_reason(sequence.params, self._eos_token_ids, drawn.token_id, num_output)
        produced = Produce(sequence.sequence_id, num_output - 1, drawn, reason)
        return [produced, *self._end(sequence)] if reason is not None else [produced]

    def _restart(self, sequence: Sequence) -> list[Action]:
        """Its prefill is void: stop the writers, then prefill again."""
        if sequence.requeue:
            return []
        sequence.requeue = True
        stop: list[Action] = [StopPrefill(sequence.sequence_id, sequence.attempt)]
        self._release_if_untouched(sequence)
        return stop

    def _requeue(self, sequence: Sequence) -> None:
        self._ready.pop(sequence.sequence_id, None)
        sequence.requeue = True
        self._release_if_untouched(sequence)

    def _end(self, sequence: Sequence) -> list[Action]:
        if sequence.phase is Phase.ENDED:
            return []
        was = sequence.phase
        if was is Phase.DECODING:
            self._num_decoding -= 1
        sequence.phase = Phase.ENDED
        self._ready.pop(sequence.sequence_id, None)
        self._prefilling.pop(sequence.sequence_id, None)
        self._waiting.pop(sequence.sequence_id, None)
        wants_stop = was is Phase.PREFILLING and sequence.awaits_writers
        stop: list[Action] = [StopPrefill(sequence.sequence_id, sequence.attempt)] if wants_stop else []
        self._release_if_untouched(sequence)
        return stop

    def _release_if_untouched(self, sequence: Sequence) -> None:
        if not sequence.is_leaving or sequence.num_in_flight or sequence.awaits_writers:
            return
        if sequence.blocks:
            self.allocator.release(sequence.sequence_id)
            sequence.blocks = []
        if sequence.is_open:
            self._closes.append(sequence.sequence_id)
            sequence.is_open = False
        if sequence.phase is Phase.ENDED:
            self._sequences.pop(sequence.sequence_id, None)
        else:
            self._back_to_queue(sequence)

    def _back_to_queue(self, sequence: Sequence) -> None:
        sequence.requeue = False
        if sequence.phase is Phase.DECODING:
            self._num_decoding -= 1
        self._prefilling.pop(sequence.sequence_id, None)
        sequence.phase = Phase.WAITING
        self._waiting[sequence.sequence_id] = sequence
