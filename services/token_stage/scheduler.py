"""The driver of a token pipeline decides here (pure): what the next step computes, and who is preempted. Events come
in as method calls and return actions; `next_step` forms microbatches."""

from __future__ import annotations

from common.messages import ChunkWork, Drawn, Step
from common.stage.prefill_plan import PendingPrompt, plan_chunk
from services.token_stage.intake import Intake
from services.token_stage.sequence import Action, FlyingStep, Sequence

MAX_SEQUENCES_PER_STEP = 256


class TokenScheduler(Intake):
    """All decisions for one token pipeline at one epoch."""

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
                continue
            sequence.num_computed = chunk.start + chunk.num_tokens
            self.replication.computed(sequence)
            if token is not None:
                self._prefilling.pop(sequence.sequence_id, None)
                actions += self._append(sequence, token)
                if not sequence.is_leaving:
                    self._set_ready(sequence)
        return [*actions, *self._grant_waiting()]

    @property
    def num_flying(self) -> int:
        return len(self._flying)

    def next_step(self) -> Step | None:
        """The next microbatch, or None where nothing can run. Up to `num_stages` steps fly at once, each with its
        share of the sequences, so that no stage waits. An idle pipeline's last step only closes sequences."""
        if len(self._flying) >= self._num_stages:
            return None
        chunks, sequences = self._decode_chunks()
        if self._prefilling:
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
        self._opens.append(sequence.opened())

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
        if any(sequence.is_leaving and sequence.blocks for sequence in self._sequences.values()):
            return False  # blocks come back as soon as nobody reads them any more
        victim = max(self._ready.values(), key=lambda sequence: sequence.arrival, default=None)
        if victim is None:
            return False
        if victim is needy and len(self._sequences) - len(self._waiting) == 1:
            raise AssertionError("a sequence that fits alone found no block")
        self._requeue(victim)
        return victim is not needy
