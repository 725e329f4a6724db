"""A driver asks a prompt pipeline that is there, and only one of which it knows who drives it."""

from __future__ import annotations

import msgspec

from common.membership import PipelineRecord
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
