"""What is asked for again until it is answered, as a connection that breaks loses what was on its way (pure).

Whoever asks does so until every stage has answered. A stage does each thing once, and answers as often as it is asked:
its answer may be what was lost, and what it would do again might touch what is somebody else's by then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

import msgspec

from common.membership import PipelineRecord
from common.replica_messages import Pull, Pulled

MAX_ANSWERS = 4096

Answer = TypeVar("Answer")


class Answers(Generic[Answer]):
    """The last `MAX_ANSWERS` that a stage has given, by what they answer."""

    def __init__(self) -> None:
        self._answers: OrderedDict[Hashable, Answer | None] = OrderedDict()

    def begin(self, key: Hashable) -> bool:
        """Whether this has not been asked for before."""
        is_new = key not in self._answers
        if is_new:
            self._answers[key] = None
        return is_new

    def give(self, key: Hashable, answer: Answer) -> None:
        self._answers[key] = answer
        while len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)

    def of(self, key: Hashable) -> Answer | None:
        """None: there is none yet, or not any more."""
        return self._answers.get(key)


class PullRequests:
    """What one driver has asked its stages to copy, by number."""

    def __init__(self, record: PipelineRecord) -> None:
        self._record = record
        self._num_asked = 0
        self._unanswered: dict[int, tuple[Pull, set[int]]] = {}

    def ask(self, pull: Pull) -> list[tuple[str, Pull]]:
        """What to send to whom, for a pull whose `checksums` are those of all layers."""
        self._num_asked += 1
        pull = msgspec.structs.replace(pull, number=self._num_asked, blocks=list(pull.blocks))
        self._unanswered[pull.number] = pull, set(range(len(self._record.stages)))
        return list(self._shares(*self._unanswered[pull.number]))

    def answered(self, pulled: Pulled) -> bool:
        """Whether it is the stage's first answer."""
        _, stages = self._unanswered.get(pulled.number, (None, set[int]()))
        if pulled.stage_index not in stages:
            return False
        stages.remove(pulled.stage_index)
        if not stages:
            del self._unanswered[pulled.number]
        return True

    def unanswered(self) -> list[tuple[str, Pull]]:
        """What to send again."""
        return [share for asked in self._unanswered.values() for share in self._shares(*asked)]

    def _shares(self, pull: Pull, stages: set[int]) -> Iterator[tuple[str, Pull]]:
        for index in sorted(stages):
            stage = self._record.stages[index]
            if stage.layers is not None:
                checksums = pull.checksums[slice(*stage.layers)]
                yield stage.name, msgspec.structs.replace(pull, checksums=checksums)
