"""Both drivers together, without I/O: in any order of messages everybody ends and every block returns."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable

import pytest

from common.handoff_messages import Handoff
from common.messages import Drawn, Prefill, Step, pack_ids
from dejavu.params import SamplingParams
from services.prompt_stage.scheduler import Action as PromptAction
from services.prompt_stage.scheduler import DeliverFirst, NeverStarted, PromptScheduler
from services.token_stage.replication import Replication
from services.token_stage.scheduler import TokenScheduler
from services.token_stage.sequence import Action, Fail, Grant, Produce, StopPrefill
from services.token_stage.swapping import DeviceTier
from services.token_stage.table import PipelineShape

NUM_LAYERS = 3
BLOCK_SIZE = 4
EOS = 0


def next_token(tokens: list[int]) -> int:
    """Stands for a model: a hash of the prefix, never EOS."""
    return hash(tuple(tokens)) % 97 + 1


class Pipelines:
    """A token pipeline (colocated or fed by a prompt pipeline) whose messages are delivered in a random order."""

    def __init__(
        self,
        seed: int,
        num_blocks: int,
        num_stages: int,
        is_colocated: bool,
        device: DeviceTier | None = None,
        num_prompt_blocks: int | None = None,
    ) -> None:
        self.draws = random.Random(seed)
        self.device = device
        self.prompt_capacity = BLOCK_SIZE * (num_prompt_blocks or num_blocks)
        self.num_outgrown = 0
        shape = PipelineShape(
            epoch=1,
            num_stages=num_stages,
            num_layers=NUM_LAYERS,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            eos_token_ids=(EOS,),
            chunk_tokens=16,
            is_colocated=is_colocated,
        )
        self.token = TokenScheduler(shape, Replication("token-0", 1, BLOCK_SIZE), device)
        self.now_s = 0.0
        self.num_guessed = self.num_right = 0
        self.guess: set[str] = set()
        self.prompt = PromptScheduler(
            epoch=1, num_stages=2, num_blocks=num_prompt_blocks or num_blocks, block_size=BLOCK_SIZE, chunk_tokens=16
        )
        self.requests: dict[str, tuple[list[int], SamplingParams]] = {}
        self.tables: dict[str, dict[str, list[int]]] = {"token": {}, "prompt": {}}
        self.opened: dict[str, tuple[str, int]] = {}
        self.flying: dict[str, deque[Step]] = {"token": deque(), "prompt": deque()}
        self.wire: list[tuple[str, tuple[object, ...]]] = []
        self.outputs: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.cancelled: set[str] = set()

    def submit(self, name: str, num_prompt: int, max_tokens: int) -> None:
        prompt = [self.draws.randrange(1, 90) for _ in range(num_prompt)]
        params = SamplingParams(max_tokens=max_tokens)
        self.requests[name] = (prompt, params)
        self.outputs[name] = []
        self.carry_out(self.token.admissions.admit(name, 0, prompt, [], params))

    def cancel(self, name: str) -> None:
        if name not in self.ended:
            self.cancelled.add(name)
            self.ended[name] = "cancelled"
            self.carry_out(self.token.admissions.cancel(name))

    def carry_out(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Grant(name, attempt, blocks, forced):
                    prompt, params = self.requests[name]
                    if len(prompt + forced) > self.prompt_capacity:
                        self.num_outgrown += 1
                        self.token.intake.compute_here(name)
                        continue
                    prefill = Prefill(
                        1, name, attempt, 0, len(prompt), pack_ids(prompt + forced), params,
                        Handoff("token", 1, blocks),
                    )  # fmt: skip
                    self.wire.append(("prefill", (prefill,)))
                case Produce(name, index, drawn, reason):
                    assert name not in self.ended or name in self.cancelled
                    assert index == len(self.outputs[name])
                    prompt, _ = self.requests[name]
                    assert drawn.token_id == next_token(prompt + self.outputs[name])
                    self.outputs[name].append(drawn.token_id)
                    if reason is not None and name not in self.ended:
                        self.ended[name] = reason
                case StopPrefill(name, attempt):
                    self.wire.append(("cancel_prefill", (name, attempt)))
                case Fail(name, error):
                    self.ended[name] = error.code

    def start_steps(self) -> None:
        while (step := self.token.next_step()) is not None:
            self.flying["token"].append(step)
        while (step := self.prompt.next_step()) is not None:
            self.flying["prompt"].append(step)

    def run_step(self, pipeline: str) -> None:
        """The oldest step of a pipeline passes its last stage."""
        step = self.flying[pipeline].popleft()
        table = self.tables[pipeline]
        for name in step.closes:
            del table[name]
            if pipeline == "prompt":
                key = self.opened.pop(name)
                self.wire += [("handoff_ended", (*key, stage, 2, False)) for stage in range(2)]
                self.wire += [("let_go", ((*key, 1), stage)) for stage in range(2)]
        for opened in step.opens:
            assert opened.sequence_id not in table
            table[opened.sequence_id] = list(memoryview(opened.token_ids).cast("i"))
            self.opened[opened.sequence_id] = (opened.sequence_id, opened.attempt)
        if pipeline == "token" and self.device is not None:
            self.check_device(self.device, step, table)
        drawn: list[Drawn] = []
        for chunk in step.chunks:
            tokens = table[chunk.sequence_id]
            if chunk.appended is not None and chunk.start == len(tokens):
                tokens.append(chunk.appended)
            assert chunk.start + chunk.num_tokens <= len(tokens)
            if pipeline == "prompt":
                sequence_id, attempt = self.opened[chunk.sequence_id]
                is_first = any(opened.sequence_id == sequence_id for opened in step.opens)
                tokens_done = (0 if is_first else chunk.start, chunk.start + chunk.num_tokens)
                # neighbouring layers that were written together are confirmed together
                cuts = [0, *(layer for layer in range(1, NUM_LAYERS) if self.draws.random() < 0.5), NUM_LAYERS]
                for layers in zip(cuts, cuts[1:], strict=False):
                    self.wire.append(("kv_confirmed", (sequence_id, attempt, layers, tokens_done, True)))
            if chunk.draws:
                assert chunk.start + chunk.num_tokens == len(tokens)
                drawn.append(Drawn(next_token(tokens)))
                tokens.append(drawn[-1].token_id)
        if pipeline == "token":
            self.now_s += 0.01
            self.carry_out(self.token.step_done(step.step, drawn, now_s=self.now_s))
            return
        for action in self.prompt.step_done(step.step, drawn):
            self._prompt_action(action)

    def check_device(self, device: DeviceTier, step: Step, table: dict[str, list[int]]) -> None:
        """A stage could hold what the step needs, and knows what it is told to expect."""
        needed = sum(-(-(chunk.start + chunk.num_tokens) // BLOCK_SIZE) for chunk in step.chunks)
        assert needed <= device.num_blocks
        decoding = [chunk for chunk in step.chunks if chunk.appended is not None]
        if device.describe()["forced"] and len(decoding) == len(step.chunks) > 1:
            assert needed <= device.num_blocks // 2 + len(decoding)
        for name, num_tokens in step.upcoming:
            assert num_tokens <= len(table[name]) + 1
        if decoding:
            self.num_guessed += len(self.guess)
            self.num_right += len(self.guess & {chunk.sequence_id for chunk in step.chunks})
        self.guess = {name for name, _ in step.upcoming}

    def _prompt_action(self, action: PromptAction) -> None:
        prefill = action.prefill
        if isinstance(action, DeliverFirst):
            self.wire.append(("first_token", (prefill.sequence_id, prefill.attempt, action.drawn, action.num_computed)))
        elif isinstance(action, NeverStarted):
            for stage in range(2):
                self.wire.append(("handoff_ended", (prefill.sequence_id, prefill.attempt, stage, 2, False)))

    def deliver_one(self) -> None:
        """Any message on the wire arrives (they come over different connections); a pair of stages keeps its order."""
        picked = self.wire[self.draws.randrange(len(self.wire))]
        if picked[0] == "kv_confirmed":
            picked = next(each for each in self.wire if each[0] == picked[0] and each[1][:2] == picked[1][:2])
        elif _is_from_driver(*picked):
            picked = next(each for each in self.wire if _is_from_driver(*each))
        self.wire.remove(picked)
        kind, arguments = picked
        if kind == "prefill":
            self.prompt.prefill(*arguments)  # type: ignore[arg-type]
        elif kind == "let_go":
            self.prompt.let_go(*arguments)  # type: ignore[arg-type]
        elif kind == "cancel_prefill":
            # same connection as its prefill: never before it
            if any(k == "prefill" and a[0].sequence_id == arguments[0] for k, a in self.wire):  # type: ignore[attr-defined]
                self.wire.append((kind, arguments))
                return
            for action in self.prompt.cancel(*arguments):  # type: ignore[arg-type]
                self._prompt_action(action)
        else:
            self.carry_out(getattr(self.token.intake, kind)(*arguments))

    @property
    def is_idle(self) -> bool:
        return not self.wire and not any(self.flying.values())


def _is_from_driver(kind: str, arguments: tuple[object, ...]) -> bool:
    return kind == "first_token" or (kind == "handoff_ended" and arguments[2] == 0)


@pytest.mark.parametrize("is_colocated", [False, True])
@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.seeds(15)
def test_everybody_ends_and_every_block_returns(seed: int, num_stages: int, is_colocated: bool) -> None:
    everybody_ends(Pipelines(seed, num_blocks=24, num_stages=num_stages, is_colocated=is_colocated), seed)


@pytest.mark.parametrize("is_colocated", [False, True])
@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.seeds(15)
def test_a_device_that_holds_two_sequences_serves_all(seed: int, mode: str, is_colocated: bool) -> None:
    device = DeviceTier(mode, 3, num_blocks=24, block_copy_s=0.0)
    pipelines = Pipelines(seed, num_blocks=72, num_stages=3, is_colocated=is_colocated, device=device)
    everybody_ends(pipelines, seed)


def test_who_has_outgrown_the_prompt_pipeline_goes_on() -> None:
    """It is preempted, and nobody has a copy: the token pipeline computes it again."""
    num_outgrown = 0
    for seed in range(20):
        pipelines = Pipelines(seed, num_blocks=24, num_stages=2, is_colocated=False, num_prompt_blocks=13)
        everybody_ends(pipelines, seed)
        num_outgrown += pipelines.num_outgrown
    assert num_outgrown > 5


def test_the_next_router_hears_of_what_has_just_finished() -> None:
    """The dead one may not have told anybody; elsewhere all of it would be computed again."""
    pipelines = Pipelines(0, num_blocks=24, num_stages=1, is_colocated=True)
    pipelines.submit("r/0/a", 10, 6)
    while "r/0/a" not in pipelines.ended:
        pipelines.start_steps()
        pipelines.run_step("token")
    pipelines.submit("s/0/a", 10, 6)
    assert pipelines.token.admissions.orphans() == ["r/0/a"]
    assert pipelines.token.admissions.known() == ["s/0/a", "r/0/a"], "its router may be dead, too"
    prompt, params = pipelines.requests["r/0/a"]
    adopted = pipelines.token.admissions.adopt("r/0/b", prompt, pipelines.outputs["r/0/a"][:4], params)
    assert adopted is not None
    assert [action.index for action in adopted[1] if isinstance(action, Produce)] == [4, 5]


def test_what_comes_next_is_guessed() -> None:
    """Without new arrivals a wrong guess is rare: a sequence ends, or grows beyond its microbatch."""
    pipelines = Pipelines(1, 200, 3, is_colocated=False, device=DeviceTier("on", 3, 60, 0.0))
    for index in range(9):
        pipelines.submit(f"r{index}/0/0", 20, 40)
    while not pipelines.is_idle or len(pipelines.ended) < 9:
        pipelines.start_steps()
        while pipelines.wire:
            pipelines.deliver_one()
        for pipeline in ("prompt", "token"):
            if pipelines.flying[pipeline]:
                pipelines.run_step(pipeline)
    assert pipelines.num_guessed > 200
    assert pipelines.num_right >= 0.9 * pipelines.num_guessed


def everybody_ends(pipelines: Pipelines, seed: int) -> None:
    num_blocks = pipelines.token.table.allocator.num_blocks
    draws = random.Random(seed + 1000)
    to_submit = [(f"r{i}/0/0", draws.randrange(1, 50), draws.randrange(1, 40)) for i in range(25)]
    for _ in range(100_000):
        if to_submit and draws.random() < 0.1:
            pipelines.submit(*to_submit.pop())
        if draws.random() < 0.01 and pipelines.requests:
            pipelines.cancel(draws.choice(list(pipelines.requests)))
        pipelines.start_steps()
        choices = [name for name in pipelines.flying if pipelines.flying[name]] + ["wire"] * bool(pipelines.wire)
        if choices:
            choice = draws.choice(choices)
            if choice == "wire":
                pipelines.deliver_one()
            else:
                pipelines.run_step(choice)
        pipelines.token.table.allocator.check()
        if not to_submit and not choices:
            break
    assert set(pipelines.ended) == set(pipelines.requests)
    assert pipelines.token.table.allocator.num_free == num_blocks
    assert pipelines.prompt.num_free * BLOCK_SIZE == pipelines.prompt_capacity
    for name, reason in pipelines.ended.items():
        if reason == "length":
            assert len(pipelines.outputs[name]) == pipelines.requests[name][1].max_tokens
    assert pipelines.token.table.costs.recoveries == pipelines.token.table.costs.recomputed_tokens == 0, (
        "nothing has failed"
    )
    assert bool(pipelines.token.table.costs.preemptions) >= bool(
        pipelines.token.table.costs.recomputed_after_preemption_tokens
    )


def test_too_large_for_the_pool_is_refused_at_once() -> None:
    pipelines = Pipelines(0, num_blocks=4, num_stages=1, is_colocated=False)
    pipelines.submit("big", 10, 7)
    assert pipelines.ended == {"big": "context_exceeded"}
    pipelines.submit("fits", 10, 6)
    assert "fits" not in pipelines.ended
