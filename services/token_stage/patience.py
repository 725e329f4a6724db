"""What is asked again, and what is given up, when nothing is heard for long (pure).

A message can be lost with its connection while both ends live: nobody hears of a death then. So a driver asks prompt
pipelines from time to time about the hand-offs that have not ended as far as it knows, however long ago they began;
they answer for those that they do not know. No prompt is given up because it takes long. Only what all prompt stages
have ended, so that nothing is left but to check what lies in our pools, is waited for in seconds.
"""

from __future__ import annotations

from collections import defaultdict

from services.token_stage.intake import Intake
from services.token_stage.sequence import Action, AskStore, Phase, Sequence
from services.token_stage.table import SequenceTable

STALLED_S = 5.0
"""How long an ended hand-off may lack something, and nothing more of it is confirmed, before it is begun again. Twice
as long each time that this happens to a sequence: where checks take longer than that, one will be in time."""


class Patience:
    """What a driver does every few seconds."""

    def __init__(self, table: SequenceTable, intake: Intake) -> None:
        self._table = table
        self._intake = intake

    def ask_again(self) -> list[Action]:
        """For what stores have of those that wait for it: what was asked before, or the answer, may be lost."""
        return [AskStore(s.sequence_id, s.source) for s in self._table.sequences.values() if s.is_asking]

    def awaited(self) -> dict[tuple[str, int], list[Sequence]]:
        """Whose hand-offs have not ended, by the prompt pipeline (and its epoch) that was asked for them."""
        found: defaultdict[tuple[str, int], list[Sequence]] = defaultdict(list)
        for sequence in self._table.sequences.values():
            if sequence.awaits_writers and sequence.writer is not None:
                found[sequence.writer].append(sequence)
        return found

    def give_up_stalled(self, now_s: float) -> list[Action]:
        """Begins again what has ended and will not be complete, as far as can be told at `now_s`."""
        stalled = [s for s in self._table.sequences.values() if self._is_stalled(s, now_s)]
        actions = [action for sequence in stalled for action in self._intake.restart(sequence)]
        return [*actions, *self._intake.grant_waiting()] if stalled else []

    def _is_stalled(self, sequence: Sequence, now_s: float) -> bool:
        if not self._lacks_confirmation(sequence):
            sequence.stall = None
            return False
        progress = (sequence.attempt, sum(sequence.confirmed))
        if sequence.stall is None or sequence.stall[0] != progress:
            sequence.stall = progress, now_s
        if now_s - sequence.stall[1] < STALLED_S * 2**sequence.num_stalls:
            return False
        sequence.num_stalls += 1
        return True

    def _lacks_confirmation(self, sequence: Sequence) -> bool:
        is_ended = sequence.num_writers is not None and not sequence.awaits_writers
        return is_ended and sequence.phase is Phase.PREFILLING and not sequence.requeue
