"""Who makes up a pipeline."""

from __future__ import annotations

from common.membership import MemberRecord, PipelineRecord
from services.router.pipelines import is_spare, missing_pipelines, stand_in


def stage(name: str, index: int, incarnation: str = "1") -> MemberRecord:
    layers = (index * 2, index * 2 + 2)
    state = "standby" if "standby" in name else "active"
    return MemberRecord(
        name, "token_stage", name + incarnation, 1, "h", "tcp://127.0.0.1:1", "token-0", index, 2, layers, state
    )


FIRST, SECOND, SPARE = stage("a", 0), stage("b", 1), stage("b-standby-0", 1)
PUBLISHED = {"token-0": PipelineRecord("token-0", "token_stage", 5, (FIRST, SECOND))}


def names(records: list[PipelineRecord]) -> list[list[str]]:
    return [[member.name for member in record.stages] for record in records]


def test_incomplete_pipelines_are_not_published() -> None:
    assert missing_pipelines([FIRST], {}) == []
    assert missing_pipelines([SECOND], {}) == []
    assert missing_pipelines([FIRST, SPARE], {}) == []
    assert names(missing_pipelines([SECOND, FIRST], {})) == [["a", "b"]]


def test_what_is_published_stays_and_spares_take_over() -> None:
    assert missing_pipelines([FIRST, SECOND, SPARE], PUBLISHED) == []
    assert is_spare(SPARE, PUBLISHED)
    assert not is_spare(SECOND, PUBLISHED)
    assert names(missing_pipelines([FIRST, SPARE], PUBLISHED)) == [["a", "b-standby-0"]]
    back = stage("b", 1, "2")
    taken = {"token-0": PipelineRecord("token-0", "token_stage", 6, (FIRST, SPARE))}
    assert missing_pipelines([FIRST, SPARE, back], taken) == []
    assert is_spare(back, taken)


def test_a_stage_that_was_lost_and_came_back_begins_a_new_epoch() -> None:
    assert names(missing_pipelines([FIRST, SECOND], PUBLISHED, broken={"token-0"})) == [["a", "b"]]


def test_a_draining_stage_gives_way_where_somebody_can_take_over() -> None:
    draining = {SECOND.incarnation}
    assert stand_in(SECOND, [FIRST, SECOND], draining) is None
    assert stand_in(SECOND, [FIRST, SECOND, SPARE], draining) is SPARE
    assert names(missing_pipelines([FIRST, SECOND, SPARE], PUBLISHED, draining)) == [["a", "b-standby-0"]]
    assert missing_pipelines([FIRST, SECOND], PUBLISHED, draining) == []
