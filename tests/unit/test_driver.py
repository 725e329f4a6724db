"""What a driver hears of the stages of its pipeline."""

from __future__ import annotations

from common.messages import Admit, encode, pack_ids
from common.replica_messages import Claimed, HeldReplica, Located, Pulled
from dejavu.params import SamplingParams
from tests.unit.test_epochs import driving


def test_a_stage_that_answers_a_pull_twice_counts_once() -> None:
    stage, store = driving()

    def stage_has_copied(index: int) -> None:
        stage.arrive("", encode(Pulled(1, "r/0/a.0", 1, intact=True, stage_index=index, number=1)))

    stage.arrive("", encode(Claimed(store.name, "token-0", 1, ["r/0"])))
    stage.arrive("", encode(Admit(1, "r/0/a.0", 0, pack_ids([1, 2, 3, 4]), b"", SamplingParams(), "")))
    stage.arrive("", encode(Located(store.name, 1, "r/0/a.0", 1, HeldReplica(2, [0], [0, 0, 0]))))
    stage_has_copied(1)
    stage_has_copied(1)
    assert not stage.flying
    stage_has_copied(0)
    assert stage.flying
