"""The rule that decides whether swapping pays, against pipelines whose times are known."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import StageReady, SwapFigures
from services.token_stage.swapping import DeviceTier, Observed, StepTimes, device_tier

Period = Callable[[int], float]


def constant(_: int) -> float:
    return 0.020


def proportional(num_sequences: int) -> float:
    return 0.005 * num_sequences


class Pipeline:
    """`num_sequences` of `blocks_each` rotate through `num_stages` whose step times follow `period`."""

    def __init__(self, tier: DeviceTier, num_stages: int, period: Period, block_copy_s: float) -> None:
        self.tier = tier
        self.num_stages = num_stages
        self.period = period
        self.block_copy_s = block_copy_s
        self.now_s = 0.0
        self.num_tokens = 0
        self.num_swapping = 0

    def run(self, num_sequences: int, blocks_each: int, num_steps: int) -> float:
        """Tokens per second."""
        needs = {str(index): blocks_each for index in range(num_sequences)}
        ready = deque(needs)
        start_s, start_tokens, self.num_swapping = self.now_s, self.num_tokens, 0
        for _ in range(num_steps):
            turn = self.tier.turn(needs, 256)
            taken = [name for name in list(ready) if turn.takes(name)]
            for name in taken:
                ready.remove(name)
                ready.append(name)
            transfer_s = len(taken) * blocks_each * self.block_copy_s if self.tier.is_swapping else 0.0
            period_s = max(self.period(len(taken)), transfer_s)
            swap = SwapFigures(transfer_s, 0.0, len(taken) * blocks_each if transfer_s else 0)
            self.now_s += period_s
            self.num_tokens += len(taken)
            self.num_swapping += self.tier.is_swapping
            self.tier.observe(Observed(len(taken), period_s, swap))
        return (self.num_tokens - start_tokens) / (self.now_s - start_s)


def pipeline(mode: str, num_stages: int, period: Period, block_copy_s: float, probe_s: float | None = None) -> Pipeline:
    tier = DeviceTier(mode, num_stages, 64, block_copy_s if probe_s is None else probe_s)
    return Pipeline(tier, num_stages, period, block_copy_s)


def resident_rate(num_stages: int, period: Period, blocks_each: int) -> float:
    share = -(-(64 // blocks_each) // num_stages)
    return share / period(share)


@pytest.mark.parametrize("num_stages", [3, 4, 6])
def test_swapping_is_chosen_where_it_is_free(num_stages: int) -> None:
    """Step times that do not depend on the batch, transfers that hide: the batch is num_stages / 2 times larger."""
    free = pipeline("auto", num_stages, constant, 1e-5)
    free.run(60, 4, 400)
    assert free.tier.is_swapping
    assert free.run(60, 4, 200) >= 0.95 * num_stages / 2 * resident_rate(num_stages, constant, 4) * 0.75


@pytest.mark.parametrize("num_stages", [1, 2])
def test_with_two_stages_there_is_nothing_to_gain(num_stages: int) -> None:
    either = pipeline("auto", num_stages, constant, 0.0)
    either.run(60, 4, 400)
    assert not either.tier.is_swapping and either.num_swapping == 0


def test_a_slow_link_is_never_tried() -> None:
    """Known from the probe alone: 8 sequences of 4 blocks take 160 ms, a step takes 20."""
    slow = pipeline("auto", 4, constant, 5e-3)
    slow.run(60, 4, 2000)
    assert not slow.tier.is_swapping and slow.num_swapping == 0
    assert slow.tier.describe()["gain"] < 1


def test_where_the_batch_does_not_help_swapping_is_not_used() -> None:
    linear = pipeline("auto", 4, proportional, 1e-6)
    linear.run(10, 4, 50)  # a smaller batch first: how times depend on it shows
    linear.run(60, 4, 400)
    assert linear.num_swapping == 0


@pytest.mark.parametrize("block_copy_s", [2.2e-3, 5e-3])
def test_a_trial_that_lost_costs_little(block_copy_s: float) -> None:
    """The probe promised too much: the loss over 3,000 steps stays within two percent."""
    liar = pipeline("auto", 4, constant, block_copy_s, probe_s=1e-6)
    rate = liar.run(60, 4, 3000)
    assert 0 < liar.num_swapping < 100 and not liar.tier.is_swapping
    assert rate >= 0.98 * resident_rate(4, constant, 4)


def test_a_loss_that_no_transfer_explains_is_taken_back_too() -> None:
    """Copies that take the processor from the steps: 2.5 times as long for twice the batch."""
    shared = pipeline("auto", 4, constant, 1e-6)
    shared.period = lambda num_sequences: 0.020 if num_sequences < 5 else 0.050
    rate = shared.run(60, 4, 3000)
    assert 0 < shared.num_swapping < 100 and not shared.tier.is_swapping
    assert rate >= 0.98 * resident_rate(4, constant, 4)


def test_sequences_that_grow_make_it_stop() -> None:
    growing = pipeline("auto", 4, constant, 3e-4)
    growing.run(60, 1, 200)  # all fit
    growing.run(60, 4, 400)  # 32 blocks a step: 10 ms, hidden
    assert growing.tier.is_swapping
    # 32 blocks a step in any case, but of ever fewer sequences: what a step costs stays, what it yields falls
    growing.period = lambda num_sequences: 0.020 if num_sequences < 3 else 0.2
    growing.run(60, 8, 600)
    assert not growing.tier.is_swapping


def test_what_fits_is_never_swapped_unless_it_must() -> None:
    fitting = pipeline("auto", 4, constant, 0.0)
    fitting.run(16, 4, 400)
    assert fitting.num_swapping == 0
    forced = pipeline("on", 4, constant, 1.0)
    forced.run(16, 4, 40)
    assert forced.num_swapping == 40


@settings(max_examples=300, deadline=None)
@given(
    num_stages=st.sampled_from([3, 4, 6]),
    lengths=st.lists(st.integers(1, 6), min_size=12, max_size=60),
)
def test_two_microbatches_are_two_of_so_many_and_a_block_per_sequence(num_stages: int, lengths: list[int]) -> None:
    tier = DeviceTier("on", num_stages, 400, 0.0)
    needs = {str(index): blocks for index, blocks in enumerate(lengths)}
    ready, before = deque(needs), 0
    for _ in range(4 * num_stages):
        turn = tier.turn(needs, 256)
        taken = [name for name in list(ready) if turn.takes(name)]
        assert taken[0] == ready[0], "the first in line always takes part"
        for name in taken:
            ready.remove(name)
            ready.append(name)
        assert before + turn.num_blocks <= 2 / num_stages * sum(lengths) + len(lengths)
        before = turn.num_blocks


def test_step_times() -> None:
    times = StepTimes()
    for _ in range(3):
        times.add(4, 2.0)
    assert times.predict(100) == pytest.approx(2.0), "no slope is known"
    for x in (2, 8, 6):
        times.add(x, 1.0 + x / 4)
    for _ in range(200):
        times.add(4, 2.0)
    assert times.predict(16) == pytest.approx(5.0), "what was measured for other sizes is not forgotten"


def test_one_odd_step_decides_nothing() -> None:
    times = StepTimes()
    for period_s in (1.0, *[0.1] * 23):
        times.add(8, period_s)
    assert times.predict(8) < 0.15
    times.add(10, 2.0)
    assert times.predict(8) < 0.25, "a size that was seen once hardly counts"


def test_a_tier_needs_all_stages() -> None:
    one, two = StageReady(1, 0, 100, 20, 1e-5), StageReady(1, 1, 100, 16, 2e-5)
    tier = device_tier("auto", [one, two])
    assert tier is not None and tier.num_blocks == 16
    assert device_tier("auto", [one, StageReady(1, 1, 100)]) is None
