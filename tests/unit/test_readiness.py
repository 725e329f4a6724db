"""A driver counts what stages say of an epoch, also of one that it has not heard of itself."""

from __future__ import annotations

from common.messages import StageReady
from common.stage.readiness import Readiness


def _ready(epoch: int, stage_index: int, num_blocks: int = 8) -> StageReady:
    return StageReady(epoch, stage_index, num_blocks, num_blocks, 0.0)


def test_all_stages_of_the_same_epoch() -> None:
    readiness = Readiness(2)
    readiness.add(_ready(4, 1))
    readiness.add(_ready(5, 0))
    assert readiness.all_of(4) is None and readiness.all_of(5) is None
    readiness.add(_ready(5, 1, 6))
    readiness.add(_ready(5, 1, 7))
    assert readiness.all_of(5) == [_ready(5, 0), _ready(5, 1, 7)], "the last report counts"
    readiness.add(_ready(4, 0))
    assert readiness.all_of(5) and readiness.all_of(4) is None, "it was forgotten"


def test_who_stands_by_keeps_what_was_said_of_a_newer_epoch() -> None:
    """The next publication, which it is to drive, has reached another stage first."""
    readiness = Readiness(2)
    readiness.add(_ready(5, 0))
    readiness.add(_ready(6, 1))
    readiness.forget(5)
    readiness.add(_ready(5, 1))
    readiness.add(_ready(6, 0))
    assert readiness.all_of(6) == [_ready(6, 1), _ready(6, 0)]
