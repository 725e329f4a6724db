"""When a pipeline may change its role, and what its processes are called then."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from common.membership import MemberRecord, PipelineRecord
from common.model.spec import load_spec
from common.process import is_of_process, later_incarnation
from common.stage.options import parse_stage_options
from dejavu.errors import InvalidParameter, Unavailable
from deploy.layout import Place, plan_services
from deploy.options import parse_options
from services.router.conversion import end_of_pipeline
from services.router.placement import PipelineView
from services.token_stage.guests import Guests


def record(name: str, other: str = "", colocated: int = 0) -> PipelineRecord:
    role = f"{name.split('-')[0]}_stage"
    detail: dict[str, str | int | float] = {"other_pipeline": other, "colocated": colocated}
    stage = MemberRecord(f"{name}-stage-0", role, "1", 1, "h", "tcp://h:1", name, 0, 1, (0, 6), "active", detail)
    return PipelineRecord(name, role, 5, (stage,))


RECORDS = {r.pipeline: r for r in (record("prompt-0", "token-1"), record("prompt-1", "token-2"), record("token-0"))}
VIEWS = [PipelineView(name, r.role, 5, True, False, 100) for name, r in RECORDS.items()]
OVER = RECORDS | {"prompt-1": msgspec.structs.replace(RECORDS["prompt-1"], epoch=7, successor="token-2")}


def test_one_of_several_may_go() -> None:
    end = end_of_pipeline("prompt-1", "token", RECORDS, VIEWS, 100)
    assert end == msgspec.structs.replace(RECORDS["prompt-1"], successor="token-2")


def test_what_was_asked_for_before_is_no_error() -> None:
    assert end_of_pipeline("prompt-1", "token", OVER, VIEWS, 0) is OVER["prompt-1"]
    with pytest.raises(InvalidParameter, match="has become token-2"):
        end_of_pipeline("prompt-1", "prompt", OVER, VIEWS, 0)


@pytest.mark.parametrize(
    ("pipeline", "role", "reason"),
    [
        ("prompt-0", "gateway", "must be prompt or token"),
        ("prompt-9", "token", "no pipeline of this name: prompt-0, prompt-1, token-0"),
        ("prompt-0", "prompt", "prompt-0 is a prompt pipeline already"),
        ("token-0", "prompt", "without --other-pipeline"),
    ],
)
def test_nonsense_is_refused(pipeline: str, role: str, reason: str) -> None:
    with pytest.raises(InvalidParameter, match=reason):
        end_of_pipeline(pipeline, role, RECORDS, VIEWS, 0)


def test_a_colocated_pipeline_has_both_roles() -> None:
    with pytest.raises(InvalidParameter, match="colocated"):
        end_of_pipeline("token-0", "prompt", {"token-0": record("token-0", colocated=1)}, VIEWS, 0)


def test_the_others_must_be_able_to_take_over() -> None:
    alone = [view for view in VIEWS if view.name != "prompt-0"]
    with pytest.raises(Unavailable, match="no other prompt pipeline is ready"):
        end_of_pipeline("prompt-1", "token", RECORDS, alone, 0)
    with pytest.raises(Unavailable, match="needs 101 tokens, no other holds more than 100"):
        end_of_pipeline("prompt-1", "token", RECORDS, VIEWS, 101)


def test_every_pipeline_has_a_name_of_its_own_for_either_role() -> None:
    spec = load_spec("models/tiny")
    options = parse_options(["--prompt-pipelines", "2", "--token-pipelines", "3", "--standbys", "1", "--port", "0"])
    commands = plan_services(options, spec, Place("http://h:1", "c", "cpu", (1,), (0, 1)))
    stages = [
        parse_stage_options(command.role, None, list(command.argv[3:]))
        for command in commands
        if command.role.endswith("_stage")
    ]
    others = [stage.in_other_role() for stage in stages]
    names = [stage.name for stage in stages + others]
    assert len(set(names)) == len(names) == 20
    assert {o.pipeline for o in others} == {"token-3", "token-4", "prompt-2", "prompt-3", "prompt-4"}
    assert [other.in_other_role() for other in others] == stages
    assert others[1].name == "token-3-stage-0-standby-0"


def test_a_process_is_known_by_its_first_incarnation() -> None:
    assert later_incarnation("1f-abc", 0) == "1f-abc"
    assert is_of_process(later_incarnation("1f-abc", 2), "1f-abc") and is_of_process("1f-abc", "1f-abc")
    assert not is_of_process("1f-abcd", "1f-abc") and not is_of_process("1f-abc", "1f-abc-1")


async def test_a_pool_is_given_up_when_all_guests_are_out() -> None:
    guests, asked = Guests(), list[str]()
    await guests.gone([], asked.append)
    leaving = asyncio.create_task(guests.gone(["store", "prompt"], asked.append))
    for name in ("store", "store", "nobody"):
        await asyncio.sleep(0)
        guests.left(name)
    await asyncio.sleep(0)
    assert not leaving.done()
    guests.left("prompt")
    await leaving
    assert asked == ["prompt", "store"]


async def test_guests_are_asked_until_they_are_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.token_stage.guests.REPEAT_S", 0.0)
    guests, asked = Guests(), list[str]()

    def ask(name: str) -> None:
        asked.append(name)
        if len(asked) == 3:
            guests.left(name)

    await guests.gone(["store"], ask)
    assert asked == ["store"] * 3
