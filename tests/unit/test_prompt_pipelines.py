"""A driver asks a prompt pipeline that is there, and only one of which it knows who drives it."""

from __future__ import annotations

import msgspec

from common.membership import MemberRecord, PipelineRecord
from common.messages import Admit, PipelineReady, pack_ids, unpack_ids
from dejavu.params import SamplingParams
from services.token_stage.prompt_pipelines import PromptPipelines
from services.token_stage.sequence import Grant

RECORD = PipelineRecord("prompt-1", "prompt_stage", 4, ())
TOKENS = PipelineRecord("token-0", "token_stage", 5, ())
ADMIT = Admit(5, "r/0/t", 0, pack_ids([1, 2, 3]), b"", SamplingParams(), "prompt-0")
GRANT = Grant("r/0/t", 2, [7], [9])


def test_any_other_is_asked_where_the_one_that_is_wanted_is_not_there() -> None:
    prompts = PromptPipelines()
    assert prompts.pick("prompt-0", {"token-0": TOKENS}) is None
    assert prompts.pick("prompt-0", {"token-0": TOKENS, "prompt-1": RECORD}) is RECORD


def test_one_that_is_not_ready_is_asked_at_an_epoch_that_it_refuses() -> None:
    prompts = PromptPipelines()
    assert prompts.capacity_tokens("prompt-1") is None
    assert prompts.prefill(RECORD, ADMIT, GRANT, ("token-0", 5)).epoch == 0
    prompts.reported(PipelineReady("prompt-1", 4, 100))
    prefill = prompts.prefill(RECORD, ADMIT, GRANT, ("token-0", 5))
    assert (prefill.epoch, prefill.attempt, prefill.num_prompt_tokens) == (4, 2, 3)
    assert unpack_ids(prefill.token_ids) == [1, 2, 3, 9]
    assert (prefill.handoff.epoch, prefill.handoff.blocks, prefill.handoff.start) == (5, [7], 0)


def test_one_that_is_ready_before_it_is_known_who_it_is_is_not_asked() -> None:
    """What was published last still names the driver of the older epoch, which may be dead."""
    prompts = PromptPipelines()
    prompts.reported(PipelineReady("prompt-1", 6, 100))
    assert prompts.epoch(RECORD) == 0
    assert prompts.epoch(msgspec.structs.replace(RECORD, epoch=6)) == 6


def test_one_that_is_over_is_not_asked() -> None:
    over = PipelineRecord("prompt-0", "prompt_stage", 6, (), "token-1")
    others = {name: msgspec.structs.replace(RECORD, pipeline=name) for name in ("prompt-1", "prompt-2")}
    prompts = PromptPipelines()
    for name in ("prompt-0", "prompt-2"):
        prompts.reported(PipelineReady(name, 4, 100))
    assert prompts.pick("prompt-0", {"prompt-0": over} | others) is others["prompt-2"], "the one that is ready"
    prompts.over("prompt-0")
    assert prompts.epoch(msgspec.structs.replace(RECORD, pipeline="prompt-0")) == 0
    assert prompts.capacity_tokens("prompt-0") is None


def test_who_is_not_back_is_left_for_another_that_works() -> None:
    stage = MemberRecord("prompt-0-stage-0", "prompt_stage", "1", 1, "h", "", "prompt-0", 0, 1, (0, 6), "active")
    dead = PipelineRecord("prompt-0", "prompt_stage", 3, (stage,))
    prompts = PromptPipelines()
    prompts.reported(PipelineReady("prompt-0", 3, 100))
    assert prompts.pick("prompt-0", {"prompt-0": dead, "prompt-1": RECORD}) is dead
    assert prompts.leave(stage, {"prompt-0": dead, "prompt-1": RECORD}) is None, "the other does not work"
    prompts.reported(PipelineReady("prompt-1", 4, 100))
    assert prompts.leave(stage, {"prompt-0": dead, "prompt-1": RECORD}) is dead
    assert prompts.pick("prompt-0", {"prompt-0": dead, "prompt-1": RECORD}) is RECORD
    prompts.reported(PipelineReady("prompt-0", 3, 100))
    assert prompts.epoch(dead) == 0, "its driver says again what is true no more"
    back = msgspec.structs.replace(dead, epoch=9, stages=(msgspec.structs.replace(stage, incarnation="2"),))
    prompts.reported(PipelineReady("prompt-0", 9, 100))
    assert prompts.leave(stage, {"prompt-0": back, "prompt-1": RECORD}) is None, "it is back"
    prompts.leave(stage, {"prompt-0": dead, "prompt-1": RECORD})
    assert prompts.epoch(back) == 9, "that it is ready was heard before it was published"
