"""What a prompt pipeline computed is there for the same request again, until others need its blocks."""

from __future__ import annotations

from common.handoff_messages import Handoff
from common.kv.token_ids import num_common
from common.messages import Drawn, Prefill, Step, pack_ids
from dejavu.params import SamplingParams
from services.prompt_stage.retained import Kept, Retained
from services.prompt_stage.scheduler import DeliverFirst, PromptScheduler

PROMPT = list(range(100, 140))


def prefill(name: str, tokens: list[int], *, attempt: int = 1, choice: int = 0) -> Prefill:
    sequence_id = f"{name}/{choice}/term"
    handoff = Handoff("token-0", 1, [0])
    return Prefill(1, sequence_id, attempt, choice, len(tokens), pack_ids(tokens), SamplingParams(), handoff)


def scheduler(num_blocks: int = 40) -> PromptScheduler:
    return PromptScheduler(epoch=1, num_stages=1, num_blocks=num_blocks, block_size=4, chunk_tokens=16)


def run(prompts: PromptScheduler) -> tuple[list[Step], list[DeliverFirst]]:
    """Until nothing is left to do."""
    steps, first = [], []
    while (step := prompts.next_step()) is not None:
        steps.append(step)
        drawn = [Drawn(7) for chunk in step.chunks if chunk.draws]
        first += [action for action in prompts.step_done(step.step, drawn) if isinstance(action, DeliverFirst)]
        for sequence in list(prompts._closed.values()):
            if sequence.prefill.sequence_id in step.closes:
                prompts.let_go(sequence.full_key, 0)
    return steps, first


def num_computed(steps: list[Step]) -> int:
    return sum(chunk.num_tokens for step in steps for chunk in step.chunks)


def test_choices_of_a_request_share_its_prompt() -> None:
    prompts = scheduler()
    for choice in range(3):
        prompts.prefill(prefill("r", PROMPT, choice=choice))
    steps, first = run(prompts)
    assert num_computed(steps) == len(PROMPT) + 2, "the last token, for what it leads to"
    assert [each.num_computed for each in first] == [len(PROMPT), 1, 1]
    assert prompts.num_free == 40 > prompts.allocator.num_free
    assert prompts.retained() == {"blocks": 10, "found_tokens": 2 * len(PROMPT)}


def test_a_sequence_that_comes_again_goes_on_where_it_was() -> None:
    prompts = scheduler()
    prompts.prefill(prefill("r", PROMPT))
    run(prompts)
    prompts.prefill(prefill("r", [*PROMPT, 7, 8], attempt=2))
    steps, first = run(prompts)
    assert [(chunk.start, chunk.num_tokens) for step in steps for chunk in step.chunks] == [(40, 2)]
    assert [each.num_computed for each in first] == [2]
    opened = [each for step in steps for each in step.opens]
    assert len(opened[0].blocks) == 11, "a block more than before"


def test_what_was_cancelled_half_way_is_kept_as_well() -> None:
    prompts = scheduler()
    prompts.prefill(prefill("r", PROMPT))
    step = prompts.next_step()
    assert step is not None
    prompts.cancel("r/0/term", 1)
    prompts.step_done(step.step, [])
    prompts.prefill(prefill("r", PROMPT, attempt=2))
    assert num_computed(run(prompts)[0]) == len(PROMPT) - 16


def test_other_requests_find_nothing() -> None:
    prompts = scheduler()
    prompts.prefill(prefill("r", PROMPT))
    prompts.prefill(prefill("other", PROMPT))
    assert num_computed(run(prompts)[0]) == 2 * len(PROMPT)


def test_what_others_need_goes_oldest_first() -> None:
    prompts = scheduler(num_blocks=30)
    for name in ("a", "b", "c"):
        prompts.prefill(prefill(name, PROMPT))
        run(prompts)
    prompts.prefill(prefill("d", PROMPT))
    run(prompts)
    for name, expected in (("c", 1), ("b", 1), ("a", 40)):
        prompts.prefill(prefill(name, PROMPT, attempt=2))
        assert num_computed(run(prompts)[0]) == expected, name
        prompts.allocator.check()


def test_the_longest_common_beginning_is_taken() -> None:
    retained = Retained()
    retained.keep(Kept(1, "r", [0], pack_ids([1, 2, 3])))
    retained.keep(Kept(2, "r", [1], pack_ids([1, 2, 3, 4])))
    retained.keep(Kept(3, "s", [2], pack_ids([1, 2, 3, 4, 5])))
    assert retained.num_blocks == 3
    found = retained.take("r", pack_ids([1, 2, 3, 4, 5]))
    assert found is not None and (found[0].lease, found[1]) == (2, 4)
    assert retained.take("r", pack_ids([9, 9])) is None
    assert retained.num_blocks == 2
    assert num_common(b"", pack_ids([1])) == 0
