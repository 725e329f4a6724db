"""What is lost with a connection while everybody lives: no stream waits for it for ever, and nothing stays behind."""

from __future__ import annotations

import pytest

from common.handoff_messages import HandoffEnded, KvArrived, LetGo
from common.messages import (
    Admit,
    CancelSequence,
    FirstToken,
    Message,
    PipelineReady,
    Prefill,
    StageReady,
    Step,
    StepDone,
    TokensProduced,
)
from common.replica_messages import Claim, Claimed, Locate, Located, Pull, Pulled, Replicate, Replicated
from services.token_stage.patience import Patience
from tests.unit.fleet_stages import FleetTokenStage
from tests.unit.fleet_world import CUTS, Fleet
from tests.unit.test_fleet import check_end, finish, settle, simulate, submit

UNEVEN = CUTS[1]


@pytest.mark.seeds(4)
def test_what_is_lost_on_the_way_is_missed(seed: int) -> None:
    simulate(seed, loss=0.05)


@pytest.mark.seeds(4)
def test_what_is_lost_between_uneven_stages_is_missed(seed: int) -> None:
    simulate(seed, loss=0.1, is_cut=True)


def lose_nth(world: Fleet, kind: type[Message], nth: int) -> list[Message]:
    """The `nth` of these messages goes nowhere. What was sent of them so far."""
    sent: list[Message] = []

    def is_nth(message: Message) -> bool:
        sent.extend([message] * isinstance(message, kind))
        return sent[nth - 1 :] == [message]

    world.loses = is_nth
    return sent


def finish_without(world: Fleet, kind: type[Message], nth: int, num_requests: int) -> None:
    """The `nth` of these messages is lost, and all requests end as they should."""
    sent = lose_nth(world, kind, nth)
    submit(world, num_requests, num_prompt=10)
    finish(world)
    assert len(sent) >= nth, "none was lost"


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(
    "kind", [Prefill, FirstToken, KvArrived, HandoffEnded, Claim, Claimed], ids=lambda kind: kind.__name__
)
def test_one_message_of_a_hand_off_is_lost(kind: type[Message], nth: int) -> None:
    world = Fleet(nth, num_token=1, num_prompt=1)
    finish_without(world, kind, nth, 6)


def test_who_hears_of_an_end_only_by_asking_does_not_wait_for_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Word of both went over one connection, which broke."""
    monkeypatch.setattr(Patience, "give_up_stalled", lambda *_: [])
    world = Fleet(1, num_token=1, num_prompt=1)
    lost: list[Message] = []

    def is_first_of_its_kind(message: Message) -> bool:
        is_lost = isinstance(message, KvArrived | HandoffEnded) and not any(type(message) is type(m) for m in lost)
        lost.extend([message] * is_lost)
        return is_lost

    world.loses = is_first_of_its_kind
    submit(world, 1, num_prompt=10)
    finish(world)
    assert len(lost) == 2


@pytest.mark.parametrize("nth", [1, 2, 5, 20])
@pytest.mark.parametrize("kind", [Admit, TokensProduced], ids=lambda kind: kind.__name__)
def test_one_message_between_a_router_and_a_pipeline_is_lost(kind: type[Message], nth: int) -> None:
    """Also of the end of a stream, of which the pipeline knows nothing any more."""
    world = Fleet(nth, num_token=1, num_prompt=1)
    finish_without(world, kind, nth, 20)


def test_what_nobody_wants_any_more_ends_though_word_of_that_is_lost() -> None:
    world = Fleet(1, num_token=1, num_prompt=1)
    sent = lose_nth(world, CancelSequence, 1)
    world.submit("r", 10, 60)
    settle(world, until=lambda: bool(world.clients["r"].delivered[0]))
    world.leader.requests.cancel("r")
    settle(world)
    [token] = world.stages(FleetTokenStage)
    assert len(sent) > 1 and not token.driver.scheduler.table.finished, "it went on to its end"
    assert world.clients.pop("r").outcome == "cancelled"
    check_end(world)


@pytest.mark.parametrize("nth", range(1, 7))
@pytest.mark.parametrize("kind", [StageReady, PipelineReady], ids=lambda kind: kind.__name__)
def test_one_message_about_a_start_is_lost(kind: type[Message], nth: int) -> None:
    world = Fleet(nth, num_token=2, num_prompt=1, cuts=[UNEVEN])
    finish_without(world, kind, nth, 6)


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize(
    "kind", [Pull, Pulled, LetGo, Locate, Located, Replicate, Replicated], ids=lambda kind: kind.__name__
)
def test_one_message_about_a_copy_is_lost(kind: type[Message], nth: int) -> None:
    """All pipelines have begun another epoch after the streams."""
    world = Fleet(nth, num_token=1, num_prompt=1, cuts=[UNEVEN])
    submit(world, 6, num_prompt=50)
    settle(world, until=lambda: any(ids for each in world.clients.values() for ids in each.delivered))
    world.broken.update(world.records)
    world.publish()
    sent = lose_nth(world, kind, nth)
    finish(world)
    assert len(sent) >= nth, "none was lost"


@pytest.mark.parametrize("nth", [1, 20])
@pytest.mark.parametrize("kind", [Step, StepDone], ids=lambda kind: kind.__name__)
def test_a_step_is_lost_between_two_stages(kind: type[Message], nth: int) -> None:
    """Its driver is replaced, and no stream is lost."""
    world = Fleet(nth, num_token=1, num_prompt=1, cuts=CUTS)
    finish_without(world, kind, nth, 6)
