"""The driver of a token pipeline decides here (pure). Events come in as method calls and return actions; the parts
share one table of sequences:

    admissions   what routers ask: sequences are admitted, lose a router, are adopted by another, end
    intake       how a sequence gets its KV: blocks are lent, a prompt pipeline computes it or a store has a copy
    patience     what is asked again, or begun again, when nothing is heard for long
    scheduler    what the next step computes, and who is preempted for it
    table        how sequences become ready, end, and give their blocks back
"""

from __future__ import annotations

from common.messages import ChunkWork, Drawn, SequenceOpen, Step, SwapFigures
from common.stage.prefill_plan import PendingPrompt, plan_chunk
from services.token_stage.admissions import Admissions
from services.token_stage.intake import Intake
from services.token_stage.patience import Patience
from services.token_stage.replication import Replication
from services.token_stage.sequence import Action, FlyingStep, Phase, Sequence
from services.token_stage.swapping import DeviceTier, Observed, Turn
from services.token_stage.table import PipelineShape, SequenceTable

MAX_SEQUENCES_PER_STEP = 256


class TokenScheduler:
    """All decisions for one token pipeline at one epoch. What is heard of sequences goes to one of its parts, which
    share the `table`; steps are formed here."""

    def __init__(self, shape: PipelineShape, replication: Replication, device: DeviceTier | None = None) -> None:
        self.table = SequenceTable(shape, replication, device)
        self.intake = Intake(self.table)
        self.admissions = Admissions(self.table, self.intake)
        self.patience = Patience(self.table, self.intake)
        self._opens: list[SequenceOpen] = []
        self._flying: dict[int, FlyingStep] = {}
        self._num_steps = 0
        self._last_done_s: float | None = None
        self._owes_prefill = False
        """no prompt found room beside the token steps: the next step is the prompts' alone"""

    def step_done(
        self, step: int, drawn: list[Drawn], *, now_s: float = 0.0, swap: SwapFigures | None = None
    ) -> list[Action]:
        """The last stage finished a step at `now_s`. Raises `KeyError` for a step that is not in flight."""
        was_full = len(self._flying) == self.table.shape.num_stages
        flying = self._flying.pop(step)
        if self.table.device is not None:
            self._measure(self.table.device, flying.step, now_s if was_full else None, swap)
        actions: list[Action] = []
        draws = iter(drawn)
        for chunk, sequence in zip(flying.step.chunks, flying.sequences, strict=True):
            sequence.num_in_flight -= 1
            token = next(draws) if chunk.draws else None
            if sequence.is_leaving:
                self.table.release_if_untouched(sequence)
                continue
            sequence.num_computed = chunk.start + chunk.num_tokens
            self.table.replication.computed(sequence)
            if token is not None:
                self.table.prefilling.pop(sequence.sequence_id, None)
                actions += self.table.append(sequence, token)
                if not sequence.is_leaving:
                    self.table.set_ready(sequence)
        return [*actions, *self.intake.grant_waiting()]

    def _measure(self, device: DeviceTier, step: Step, now_s: float | None, swap: SwapFigures | None) -> None:
        """Steps that left a pipeline which was full all the time say how fast it is; prompts would blur that."""
        before_s, self._last_done_s = self._last_done_s, now_s
        if now_s is not None and before_s is not None and all(chunk.num_tokens == 1 for chunk in step.chunks):
            device.observe(Observed(len(step.chunks), now_s - before_s, swap))

    def next_step(self) -> Step | None:
        """The next microbatch, or None where nothing can run. Up to `num_stages` steps fly at once, each with its
        share of the sequences, so that no stage waits. An idle pipeline's last step only closes sequences."""
        if len(self._flying) >= self.table.shape.num_stages:
            return None
        turn = self._turn()
        chunks, sequences = ([], []) if self._owes_prefill else self._decode_chunks(turn)
        if self.table.prefilling:
            self._add_prefill_chunks(chunks, sequences, turn)
        if not chunks and (self._flying or not self.table.closes):
            return None
        upcoming = [] if self.table.device is None else self._upcoming(sequences)
        parked = [] if self.table.device is None else self.table.device.take_parked()
        step = Step(self.table.shape.epoch, self._num_steps, self.table.closes, self._opens, chunks, upcoming, parked)
        self._opens, self.table.closes = [], []
        self._flying[step.step] = FlyingStep(step, tuple(sequences))
        self._num_steps += 1
        return step

    def _turn(self) -> Turn:
        """Who may be part of the next step, as far as room on the devices is concerned."""
        if self.table.device is None:
            share = min(MAX_SEQUENCES_PER_STEP, -(-self.table.num_decoding // self.table.shape.num_stages))
            return Turn(dict.fromkeys(self.table.ready, 0), share, 0)
        needs = {
            sequence.sequence_id: min(self.table.blocks_for(len(sequence.tokens) + 1), self.table.max_sequence_blocks)
            for sequence in self.table.sequences.values()
            if sequence.phase is Phase.DECODING and not sequence.requeue and not sequence.is_orphan
        }
        return self.table.device.turn(needs, MAX_SEQUENCES_PER_STEP)

    def _decode_chunks(self, turn: Turn) -> tuple[list[ChunkWork], list[Sequence]]:
        chunks: list[ChunkWork] = []
        sequences: list[Sequence] = []
        for sequence in list(self.table.ready.values()):
            if turn.is_full:
                break
            # it may have been preempted for one before it
            if sequence.sequence_id not in self.table.ready or not turn.takes(sequence.sequence_id):
                continue
            new_blocks = self._blocks_for_next(sequence)
            if new_blocks is None:
                continue
            del self.table.ready[sequence.sequence_id]
            start = len(sequence.tokens) - 1
            self._open(sequence)
            chunks.append(ChunkWork(sequence.sequence_id, start, 1, new_blocks, sequence.tokens[-1], draws=True))
            sequence.num_scheduled = start + 1
            sequence.num_in_flight += 1
            sequences.append(sequence)
        return chunks, sequences

    def _upcoming(self, taken: list[Sequence]) -> list[tuple[str, int]]:
        """What the step after this one will probably have: those that are ready, then those of the oldest step in
        flight, each with the number of tokens that have KV by then. They are opened now, so that stages know them."""
        oldest = next(iter(self._flying.values())).sequences if self._flying else tuple(taken)
        flying = [s for s in oldest if s.phase is Phase.DECODING and not s.is_leaving and not s.is_orphan]
        ready = [s for s in self.table.ready.values() if s.num_computed == len(s.tokens) - 1]
        turn = self._turn()
        upcoming: list[tuple[str, int]] = []
        for sequence, num_tokens in [*((s, len(s.tokens) - 1) for s in ready), *((s, len(s.tokens)) for s in flying)]:
            if turn.takes(sequence.sequence_id):
                self._open(sequence)
                upcoming.append((sequence.sequence_id, num_tokens))
        return upcoming

    def _add_prefill_chunks(self, chunks: list[ChunkWork], sequences: list[Sequence], turn: Turn) -> None:
        unfinished = [s for s in self.table.prefilling.values() if s.num_scheduled < len(s.tokens)]
        fitting = [s for s in unfinished if self._fits_beside(s, turn)]
        self._owes_prefill = bool(unfinished) and not fitting
        pending = [PendingPrompt(s.sequence_id, len(s.tokens) - s.num_scheduled, s.arrival) for s in fitting]
        for sequence_id, num_tokens in plan_chunk(pending, self.table.shape.chunk_tokens - len(chunks)):
            sequence = self.table.prefilling[sequence_id]
            self._open(sequence)
            start = sequence.num_scheduled
            draws = start + num_tokens == len(sequence.tokens)
            chunks.append(ChunkWork(sequence_id, start, num_tokens, [], None, draws))
            sequence.num_scheduled += num_tokens
            sequence.num_in_flight += 1
            sequences.append(sequence)

    def _fits_beside(self, sequence: Sequence, turn: Turn) -> bool:
        """Whether a device can hold the sequence's next chunk beside all that the step has so far; counts it if so."""
        if self.table.device is None:
            return True
        blocks = self.table.blocks_for(
            min(len(sequence.tokens), sequence.num_scheduled + self.table.shape.chunk_tokens)
        )
        if turn.num_blocks + blocks > self.table.device.num_blocks:
            return False
        turn.num_blocks += blocks
        return True

    def _open(self, sequence: Sequence) -> None:
        if sequence.is_open:
            return
        sequence.is_open = True
        self._opens.append(sequence.opened())

    def _blocks_for_next(self, sequence: Sequence) -> list[int] | None:
        """Blocks that the sequence's next token needs on top of its own; None: it has to wait."""
        missing = self.table.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        if missing <= 0:
            return []
        while (extra := self.table.allocator.extend(sequence.sequence_id, missing)) is None:
            if not self._preempt_youngest(sequence):
                return None
        sequence.blocks += extra
        return list(extra) if sequence.is_open else []

    def _preempt_youngest(self, needy: Sequence) -> bool:
        """Frees the blocks of a sequence that nobody reads at present, or else of the youngest ready one younger than
        `needy`; False: there is none (then an older one, or one in flight, will make room)."""
        if any(sequence.is_leaving and sequence.blocks for sequence in self.table.sequences.values()):
            return False  # blocks come back as soon as nobody reads them any more
        if self.table.requeue_orphan():
            return True
        victim = max(self.table.ready.values(), key=lambda sequence: sequence.arrival, default=None)
        if victim is None:
            return False
        if victim is needy and self.table.num_running == 1 and not self.table.allocator.num_quarantined:
            raise AssertionError("a sequence that fits alone found no block")
        self.table.requeue(victim)
        return victim is not needy
