"""What is said about a hand-off may be lost with a connection while everybody lives. Nobody waits for ever then, and
nobody is given up who only takes long."""

from __future__ import annotations

import asyncio

import pytest

from common.handoff_messages import FencedOff, FenceOff, Handoff
from common.kv.pool import KvPool
from common.kv.server import PoolServer
from common.kv.zmq_connection import ZmqConnection
from common.messages import REPEAT_S, Drawn, Prefill, pack_ids
from common.replica_messages import Claim, Replicate
from dejavu.params import SamplingParams
from services.prompt_stage.scheduler import PromptScheduler
from services.token_stage.door import Door
from services.token_stage.fences import Fences
from services.token_stage.patience import STALLED_S
from services.token_stage.replication import Replication
from services.token_stage.scheduler import TokenScheduler
from services.token_stage.sequence import Grant, Sequence, StopPrefill
from services.token_stage.table import PipelineShape
from tests.unit.kv.link_ends import TIMEOUT_S, random_pool
from tests.unit.kv.reference import layout

LONG_S = 10_000.0
PARAMS = SamplingParams(max_tokens=4)
ASKER = ("token-0", 3)


def token_scheduler() -> TokenScheduler:
    """Two stages of a layer each, and a sequence "a" of 10 tokens that a prompt pipeline was asked to prefill."""
    shape = PipelineShape(
        epoch=3, num_stages=2, num_layers=2, num_blocks=20, block_size=4, eos_token_ids=(), chunk_tokens=16,
        is_colocated=False,
    )  # fmt: skip
    scheduler = TokenScheduler(shape, Replication("token-0", 3, 4))
    [grant] = scheduler.admissions.admit("a", 0, list(range(1, 11)), [], PARAMS)
    assert isinstance(grant, Grant)
    scheduler.intake.assign_writer("a", "prompt-0", 7)
    return scheduler


def end(scheduler: TokenScheduler, attempt: int) -> None:
    scheduler.intake.first_token("a", attempt, Drawn(5), 10)
    for stage in (0, 1):
        scheduler.intake.handoff_ended("a", attempt, stage, 2, failed=False)


def test_who_waits_is_asked_about_and_not_given_up() -> None:
    """However long the queue is, or the prompt."""
    scheduler = token_scheduler()
    for now_s in (0.0, LONG_S, 2 * LONG_S):
        assert scheduler.patience.give_up_stalled(now_s) == []
        assert [s.sequence_id for s in scheduler.patience.awaited()["prompt-0", 7]] == ["a"]
    end(scheduler, 1)
    assert not scheduler.patience.awaited()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_lost_confirmation_begins_the_hand_off_again(layer: int) -> None:
    scheduler = token_scheduler()
    end(scheduler, 1)
    scheduler.intake.kv_confirmed("a", 1, (layer, layer + 1), (0, 10), intact=True)
    now_s = LONG_S
    assert scheduler.patience.give_up_stalled(now_s) == []
    assert scheduler.patience.give_up_stalled(now_s + STALLED_S - 1) == []
    stop, again = scheduler.patience.give_up_stalled(now_s + STALLED_S)
    assert stop == StopPrefill("a", 1)
    assert isinstance(again, Grant) and again.attempt == 2


def test_corrupt_kv_that_is_found_last_begins_the_hand_off_again() -> None:
    """Nothing else happens that would have it granted."""
    scheduler = token_scheduler()
    end(scheduler, 1)
    assert [type(action) for action in scheduler.intake.kv_confirmed("a", 1, (0, 1), (0, 10), intact=False)] == [
        StopPrefill,
        Grant,
    ]


def test_who_makes_progress_is_not_given_up() -> None:
    scheduler = token_scheduler()
    end(scheduler, 1)
    for num_tokens in range(10):
        assert scheduler.patience.give_up_stalled(num_tokens * (STALLED_S - 1)) == []
        scheduler.intake.kv_confirmed("a", 1, (0, 2), (num_tokens, num_tokens + 1), intact=True)
    assert scheduler.patience.give_up_stalled(LONG_S) == []
    assert scheduler.next_step() is not None, "it decodes"


def test_each_attempt_is_waited_for_longer() -> None:
    """Where checks take that long nobody would ever begin to decode otherwise."""
    scheduler, now_s = token_scheduler(), 0.0
    for attempt in range(1, 4):
        end(scheduler, attempt)
        limit_s = STALLED_S * 2 ** (attempt - 1)
        assert (
            scheduler.patience.give_up_stalled(now_s) == scheduler.patience.give_up_stalled(now_s + limit_s - 1) == []
        )
        now_s += limit_s
        assert scheduler.patience.give_up_stalled(now_s)
        scheduler.intake.assign_writer("a", "prompt-0", 7)


def prefill(attempt: int, epoch: int = ASKER[1]) -> Prefill:
    handoff = Handoff(ASKER[0], epoch, [0, 1, 2])
    return Prefill(7, "a", attempt, 0, 10, pack_ids(range(1, 11)), PARAMS, handoff)


def prompt_scheduler() -> PromptScheduler:
    return PromptScheduler(epoch=7, num_stages=2, num_blocks=20, block_size=4, chunk_tokens=16)


def test_a_prompt_pipeline_says_what_it_does_not_know() -> None:
    scheduler = prompt_scheduler()
    assert scheduler.disown([("a", 1)], ASKER) == ([("a", 1)], {})
    scheduler.prefill(prefill(2))
    step = scheduler.next_step()
    assert step is not None and scheduler.disown([("a", 2)], ASKER) == ([], {})
    scheduler.step_done(step.step, [Drawn(5)])
    scheduler.next_step()
    scheduler.let_go(("a", 2, 3), 0, {"link": 4})
    assert scheduler.disown([("a", 2)], ASKER) == ([], {"link": 4}), "a stage may still write"
    scheduler.let_go(("a", 2, 3), 0, {"link": 4})
    assert scheduler.not_let_go(0) == [] and scheduler.not_let_go(1) == [("a", 2, 3)], "it is asked again"
    scheduler.let_go(("a", 2, 3), 1, {"link": 3, "other": 1})
    assert scheduler.disown([("a", 2)], ASKER) == ([("a", 2)], {"link": 4, "other": 1})


def test_who_was_disowned_does_not_begin() -> None:
    """Its blocks were given to others: that the message was only late must not matter."""
    scheduler = prompt_scheduler()
    scheduler.disown([("a", 1)], ASKER)
    scheduler.prefill(prefill(1))
    assert scheduler.next_step() is None
    scheduler.prefill(prefill(1, epoch=4))
    assert scheduler.next_step() is not None, "another epoch's is another"


def test_a_fence_is_asked_for_until_each_stage_has_answered() -> None:
    fences = Fences(num_stages=2)
    fences.ask({"prompt-0": 5})
    assert fences.unanswered(0) == {}, "it has not been sent yet"
    fences.take_asked()
    fences.confirm(0, {"prompt-0": 5})
    assert fences.unanswered(0) == {} and fences.unanswered(1) == {"prompt-0": 5}
    fences.ask({"prompt-0": 6})
    fences.take_asked()
    assert fences.unanswered(0) == {"prompt-0": 6}


async def test_a_fence_that_takes_long_is_raised_once() -> None:
    source, pool = random_pool(layout()), KvPool.create(layout(), name="owner")
    server, told = await PoolServer.start(pool, "127.0.0.1", "first"), list[FencedOff]()
    door = Door(server, 1, lambda: None)
    writer = ZmqConnection(server.offer, TIMEOUT_S)
    await writer.enter(source, "nixl", {"a": 4, "b": 1, "its incarnation": 0})
    async with asyncio.timeout(TIMEOUT_S):
        first = asyncio.create_task(door.fence_off(FenceOff(3, {"a": 5}), told.append))
        await asyncio.sleep(0)
        await door.fence_off(FenceOff(3, {"a": 5}), told.append)
        more = asyncio.create_task(door.fence_off(FenceOff(3, {"a": 5, "b": 2}), told.append))
        await server.fence({"somebody else": 1})
        assert not told and not first.done() and not more.done()
        await server.bury("its incarnation")
        await asyncio.gather(first, more)
        assert told == [FencedOff(3, 1, {"a": 5}), FencedOff(3, 1, {"b": 2})]
        await door.fence_off(FenceOff(3, {"a": 5}), told.append)
        assert told[2:] == [FencedOff(3, 1, {"a": 5})], "an answer that was lost is given again"
    await writer.aclose()
    await door.aclose()


def claimed_store(sequence: Sequence) -> tuple[Replication, Replicate]:
    """Replicas of one sequence, and the first batch that their store is sent."""
    replication = Replication("token-0", 3, 4)
    replication.store_joined("store", was_there=False)
    assert replication.flush() == replication.flush(REPEAT_S) == [("store", Claim("token-0", 3))]
    replication.claimed("store", [])
    replication.computed(sequence)
    [(_, batch)] = replication.flush(REPEAT_S)
    assert isinstance(batch, Replicate)
    return replication, batch


def decoding() -> Sequence:
    return Sequence("a/0/x", 0, PARAMS, 10, list(range(1, 12)), arrival=0, blocks=[0, 1, 2], num_computed=10)


def test_a_store_that_answers_a_claim_twice_is_still_asked_for_its_batch() -> None:
    """It was asked twice; the batch was under way when its second answer came."""
    replication, batch = claimed_store(decoding())
    replication.claimed("store", [])
    assert replication.flush(2 * REPEAT_S) == [("store", batch)]
