"""What routers ask of a token pipeline (pure): sequences are admitted, lose a router, are adopted by another, end."""

from __future__ import annotations

from common.replica_messages import NEVER, Placed, replica_key
from dejavu.params import SamplingParams
from services.token_stage.intake import Intake
from services.token_stage.sequence import Action, Fail, Phase, Produce, Sequence, max_lag, too_long
from services.token_stage.table import SequenceTable


class Admissions:
    """Events that come from routers; each returns what there is to do."""

    def __init__(self, table: SequenceTable, intake: Intake) -> None:
        self._table = table
        self._intake = intake
        self._num_arrivals = 0

    def admit(
        self,
        sequence_id: str,
        choice: int,
        prompt: list[int],
        forced: list[int],
        params: SamplingParams,
        placed: Placed = NEVER,
    ) -> list[Action]:
        """Queues a sequence; a known id is ignored (the router may repeat itself). It takes the place of one that
        another router had for the same request."""
        if sequence_id in self._table.sequences:
            return []
        needed = self._table.blocks_for(len(prompt) + params.max_tokens)
        if needed > self._table.max_sequence_blocks:
            return [
                Fail(sequence_id, too_long(len(prompt), params.max_tokens, needed, self._table.max_sequence_blocks))
            ]
        older = self._table.by_key.get(replica_key(sequence_id))
        ended = [] if older is None else self._table.end(older, is_superseded=True)
        sequence = Sequence(sequence_id, choice, params, len(prompt), prompt + forced, self._num_arrivals)
        sequence.placed = placed
        sequence.max_lag = max_lag(params.durability or self._table.shape.durability)
        self._num_arrivals += 1
        self._table.sequences[sequence_id] = self._table.by_key[replica_key(sequence_id)] = sequence
        self._table.waiting[sequence_id] = sequence
        return [*ended, *self._intake.grant_waiting()]

    def orphan(self, sequence_id: str) -> None:
        """Its router is gone: it pauses, and keeps what nobody has got yet, until another one asks for it (`adopt`) or
        it is cancelled."""
        sequence = self._table.sequences.get(sequence_id)
        if sequence is not None:
            sequence.is_orphan = True
            self._table.ready.pop(sequence_id, None)

    def orphans(self) -> list[str]:
        """Those that wait for another router, and the last that finished: theirs may not have told anybody."""
        waiting = [sequence.sequence_id for sequence in self._table.sequences.values() if sequence.is_orphan]
        return waiting + self._last_finished()

    def known(self) -> list[str]:
        """All that live, and the last that finished: whose router may be dead, though we have not heard of it."""
        return list(self._table.sequences) + self._last_finished()

    def adopt(
        self, sequence_id: str, prompt: list[int], forced: list[int], params: SamplingParams
    ) -> tuple[str, list[Action]] | None:
        """Another router has the request of a sequence that lives here, or has just finished, and knows its output
        `forced`. Returns what that sequence is called here and the tokens that follow; None: it has to be admitted."""
        key = replica_key(sequence_id)
        sequence = self._table.by_key.get(key) or self._table.finished.get(key)
        if sequence is None or sequence.sequence_id == sequence_id:
            return None
        missing = sequence.frames_after(prompt, forced, params)
        is_cancelled = sequence.phase is Phase.ENDED and self._table.finished.get(key) is not sequence
        if missing is None or is_cancelled:
            return None
        sequence.is_orphan = False
        if sequence.phase is Phase.DECODING and not sequence.num_in_flight and not sequence.is_leaving:
            self._table.set_ready(sequence)
        return sequence.sequence_id, [*missing, *self._table.deliver(sequence), *self._intake.grant_waiting()]

    def frames_from(self, sequence_id: str, index: int) -> list[Produce] | None:
        """What its router was sent from that token on; None: its router has to admit it again."""
        sequence = self._table.sequences.get(sequence_id)
        return None if sequence is None or sequence.is_orphan else sequence.frames_from(index)

    def is_outdated(self, sequence_id: str, placed: Placed) -> bool:
        """Whether its sequence was given to us later than that, by the successor of whoever says so."""
        sequence = self._table.by_key.get(replica_key(sequence_id))
        return sequence is not None and placed < sequence.placed

    def placed_again(self, sequence_id: str, placed: Placed, follows: int = 0, *, was_elsewhere: bool) -> None:
        """It may still live here. Another pipeline that had it meanwhile may have put its copy in ours' place: one that
        this router had given it to (`was_elsewhere`), or one of a router that led after the one that gave it to us and
        before the one that has led since `follows`."""
        sequence = self._table.by_key.get(replica_key(sequence_id))
        if sequence is not None:
            led_since, sequence.placed = sequence.placed[0], placed
            if was_elsewhere or (follows and led_since not in (follows, placed[0])):
                self._table.replication.distrust(sequence)

    def cancel(self, sequence_id: str) -> list[Action]:
        """Ends a sequence; its blocks return as soon as nothing touches them."""
        sequence = self._table.sequences.get(sequence_id)
        if sequence is None:
            return []
        return [*self._table.end(sequence), *self._intake.grant_waiting()]

    def _last_finished(self) -> list[str]:
        return [sequence.sequence_id for sequence in self._table.finished.values()]
