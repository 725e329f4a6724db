"""Who makes up a pipeline."""

from __future__ import annotations

import msgspec

from common.membership import MemberRecord, PipelineRecord
from common.succession import is_retired, not_over
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


def test_who_belongs_to_a_pipeline_that_is_over_forms_none() -> None:
    over = {"token-0": msgspec.structs.replace(PUBLISHED["token-0"], epoch=6, successor="prompt-1")}
    assert missing_pipelines([FIRST, SECOND, SPARE], over) == []
    assert not is_spare(SPARE, over)
    turned_back = over | {"prompt-1": PipelineRecord("prompt-1", "prompt_stage", 9, (FIRST,), "token-0")}
    (record,) = missing_pipelines([SPARE, SECOND, FIRST], turned_back)
    assert [stage.name for stage in record.stages] == ["a", "b"]
    assert (record.epoch, record.successor) == (6, None), "it takes the place of what is published"


def test_the_latest_word_says_where_a_process_belongs() -> None:
    token = msgspec.structs.replace(PUBLISHED["token-0"], epoch=6, successor="prompt-1")
    prompt = PipelineRecord("prompt-1", "prompt_stage", 9, (FIRST,))
    assert not is_retired("token-0", {}) and not is_retired("token-0", PUBLISHED)
    assert is_retired("token-0", {"token-0": token})
    records = {"token-0": token, "prompt-1": prompt}
    assert (is_retired("token-0", records), is_retired("prompt-1", records)) == (True, False)
    records["prompt-1"] = msgspec.structs.replace(prompt, epoch=12, successor="token-0")
    assert (is_retired("token-0", records), is_retired("prompt-1", records)) == (False, True)
    records["token-0"] = msgspec.structs.replace(token, epoch=15)
    assert (is_retired("token-0", records), is_retired("prompt-1", records)) == (True, False)
    assert list(not_over(records)) == []
