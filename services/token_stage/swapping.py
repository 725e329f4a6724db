"""Which sequences rotate through a device that cannot hold all of them, and whether that pays (pure).

*Resident*: as many as the device holds, the others wait with their KV on the host. *Swapping*: one microbatch per
stage, each of up to half the device, so that one comes in while another computes (the paper's microbatch swapping).
Swapping pays iff

    n_s / max(t(n_s), transfer) > n_r / t(n_r)

with n the sequences of a microbatch and t the time between two steps that leave a full pipeline. Where t does not
depend on n and n_s = 2 n_r, this is the paper's 2 N t >= sum over N steps of max(t, transfer_i).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.messages import StageReady, SwapFigures

WEIGHT = 0.05
COPY_WEIGHT = 0.3
"""Of a new observation against those before it."""
MIN_SAMPLES = 8
TO_BEGIN = 1.05
"""So much better swapping must look before it is tried."""
TRIAL_STEPS = 24
MIN_TRIAL_STEPS = 12
CLEAR_LOSS = 0.8
"""A trial ends early where it is so much worse, or where the transfers alone take too long."""
MIN_GROWTH = 1.2
"""By so much microbatches must grow for a loss to count against swapping."""
FIRST_PAUSE_STEPS = 256
"""For so many steps swapping is not tried again after it lost, then for twice as many."""
MAX_PAUSE_STEPS = 1 << 16


class StepTimes:
    """How long a step of n sequences takes: what was measured lately for each n, and a line through that."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._recent: dict[int, tuple[float, float]] = {}
        """mean period and its weight in samples, by number of sequences"""

    def add(self, num_sequences: int, period_s: float) -> None:
        """One observation: as much as each one before it at first, later `WEIGHT` of all."""
        self.num_samples += 1
        mean_s, weight = self._recent.get(num_sequences, (period_s, 0.0))
        weight = min(weight + 1.0, 1.0 / WEIGHT)
        self._recent[num_sequences] = (mean_s + (period_s - mean_s) / weight, weight)

    def predict(self, num_sequences: float) -> float:
        """Weighted least squares, never falling; constant where only one n was seen. Raises `ZeroDivisionError` before
        the first observation."""
        points = [(n, mean_s, weight) for n, (mean_s, weight) in self._recent.items()]
        total = sum(weight for _, _, weight in points)
        mean_n = sum(n * weight for n, _, weight in points) / total
        mean_s = sum(period_s * weight for _, period_s, weight in points) / total
        variance = sum((n - mean_n) ** 2 * weight for n, _, weight in points)
        if not variance:
            return mean_s
        covariance = sum((n - mean_n) * (period_s - mean_s) * weight for n, period_s, weight in points)
        return mean_s + max(0.0, covariance / variance) * (num_sequences - mean_n)


@dataclass(frozen=True, slots=True)
class Observed:
    """A step that left a full pipeline `period_s` after the one before."""

    num_sequences: int
    period_s: float
    swap: SwapFigures | None


class Turn:
    """Picks the sequences of one step: of those that rotate (with the blocks they need), `share` at most, in
    `max_blocks` together. The first always fits."""

    def __init__(self, rotating: Mapping[str, int], share: int, max_blocks: float, slack_blocks: int = 0) -> None:
        self.num_blocks = 0
        self._rotating = rotating
        self._room = share
        self._max_blocks = max_blocks
        self._slack_blocks = slack_blocks
        self._num_taken = 0

    @property
    def is_full(self) -> bool:
        return self._num_taken == self._room

    def takes(self, sequence_id: str) -> bool:
        """Whether the sequence is part of the step; if so it is counted."""
        blocks = self._rotating.get(sequence_id)
        if blocks is None or self.is_full:
            return False
        allowed = self._max_blocks + self._slack_blocks * (self._num_taken + 1)
        if self._num_taken and self.num_blocks + blocks > allowed:
            return False
        self._num_taken += 1
        self.num_blocks += blocks
        return True


class DeviceTier:
    """What the driver knows of the stages' devices; `mode` is auto or on (always swap)."""

    def __init__(self, mode: str, num_stages: int, num_blocks: int, block_copy_s: float) -> None:
        self.num_blocks = num_blocks
        self.is_swapping = mode == "on"
        self.peak_need_blocks = 0
        self._is_forced = mode == "on"
        self._num_stages = num_stages
        self._block_copy_s = block_copy_s
        self._resident, self._swapping = StepTimes(), StepTimes()
        self._pause_steps = FIRST_PAUSE_STEPS
        self._paused_until = 0
        self._trial_until = self._settled_at = 0
        self._num_steps = 0
        self._inputs: dict[str, float] = {}
        self._need_blocks = self._num_sequences = 0
        self._rotating: Mapping[str, int] = {}
        self._parked: list[str] = []

    # ------------------------------------------------------------ microbatches

    def turn(self, needs: Mapping[str, int], max_share: int) -> Turn:
        """For the next step; `needs` are the blocks of every decoding sequence, oldest first."""
        self._need_blocks, self._num_sequences = sum(needs.values()), len(needs)
        if self._need_blocks <= self.num_blocks and not self._is_forced:
            self.is_swapping = False
        limit = self._num_stages * (self.num_blocks // 2) if self.is_swapping else self.num_blocks
        rotating = _oldest(needs, max(limit, self.num_blocks))
        self._parked += [sequence_id for sequence_id in self._rotating if sequence_id not in rotating]
        self._rotating = rotating
        total_blocks = sum(rotating.values())
        self.peak_need_blocks = max(self.peak_need_blocks, total_blocks)
        share = min(max_share, -(-len(rotating) // self._num_stages))
        if not self.is_swapping:
            return Turn(rotating, share, self.num_blocks)
        half = self.num_blocks // 2
        if not self._is_forced:
            return Turn(rotating, share, half)
        # two microbatches are never more than 2 / stages of all, whatever the lengths: but for a block per sequence
        fair = total_blocks / self._num_stages
        return Turn(rotating, share, half) if half < fair else Turn(rotating, share, fair, slack_blocks=1)

    def take_parked(self) -> list[str]:
        """Who has left the rotation since the last call, and for whom devices need not keep room."""
        parked, self._parked = self._parked, []
        return [sequence_id for sequence_id in parked if sequence_id not in self._rotating]

    # ------------------------------------------------------------ the rule

    def observe(self, observed: Observed) -> None:
        """Learns from a step, and from time to time decides anew."""
        self._num_steps += 1
        if self._num_steps >= self._settled_at:
            fit = self._swapping if self.is_swapping else self._resident
            fit.add(observed.num_sequences, observed.period_s)
        if observed.swap is not None and observed.swap.num_blocks:
            measured_s = observed.swap.copy_s / observed.swap.num_blocks
            self._block_copy_s += (measured_s - self._block_copy_s) * COPY_WEIGHT
        if not self._is_forced:
            self._judge()

    def _judge(self) -> None:
        if not self._num_sequences or self._need_blocks <= self.num_blocks or self._num_stages < 3:
            return
        if self._resident.num_samples < MIN_SAMPLES:
            return
        gain = self._gain()
        is_sure = self._swapping.num_samples < MIN_TRIAL_STEPS or self._num_steps >= self._trial_until
        if self.is_swapping and gain < (1.0 if is_sure else CLEAR_LOSS):
            self._switch(False)
            # with hardly more sequences than fit there was nothing to win, so nothing is learnt from that
            if self._inputs["microbatch_swapping"] > MIN_GROWTH * self._inputs["microbatch_resident"]:
                self._pause()
        elif not self.is_swapping and gain > TO_BEGIN and self._num_steps >= self._paused_until:
            self._switch(True)
            self._trial_until = self._settled_at + TRIAL_STEPS

    def _pause(self) -> None:
        self._swapping = StepTimes()
        self._paused_until = self._num_steps + self._pause_steps
        self._pause_steps = min(2 * self._pause_steps, MAX_PAUSE_STEPS)

    def _switch(self, is_swapping: bool) -> None:
        self.is_swapping = is_swapping
        # until the microbatches of before have passed, periods say nothing
        self._settled_at = self._num_steps + self._num_stages

    def _gain(self) -> float:
        """Predicted tokens per second of swapping over those of staying resident."""
        blocks_each = self._need_blocks / self._num_sequences
        n_resident = min(self._num_sequences, self.num_blocks / blocks_each) / self._num_stages
        n_swapping = min(self._num_sequences / self._num_stages, self.num_blocks / 2 / blocks_each)
        t_resident = self._resident.predict(n_resident)
        transfer_s = n_swapping * blocks_each * self._block_copy_s
        if self._swapping.num_samples >= MIN_TRIAL_STEPS:
            t_swapping = self._swapping.predict(n_swapping)
        else:
            t_swapping = max(self._resident.predict(n_swapping), transfer_s)
        gain = (n_swapping / max(t_swapping, 1e-9)) / (n_resident / max(t_resident, 1e-9))
        self._inputs = {
            "microbatch_resident": round(n_resident, 1),
            "microbatch_swapping": round(n_swapping, 1),
            "step_resident_ms": round(1e3 * t_resident, 3),
            "step_swapping_ms": round(1e3 * t_swapping, 3),
            "transfer_ms": round(1e3 * transfer_s, 3),
            "gain": round(gain, 3),
        }
        return gain

    def describe(self) -> dict[str, Any]:
        """The decision and what it came from, for `status`."""
        return {
            "decision": "swapping" if self.is_swapping else "resident",
            "forced": self._is_forced,
            "device_blocks": self.num_blocks,
            "need_blocks": self._need_blocks,
            "peak_need_blocks": self.peak_need_blocks,
            "block_copy_us": round(1e6 * self._block_copy_s, 2),
            "measured_steps": self._num_steps,
            **self._inputs,
        }


def device_tier(mode: str, stages: Sequence[StageReady]) -> DeviceTier | None:
    """The tier in front of the stages' host pools; None where one of them has only one pool."""
    sizes = [stage.num_device_blocks for stage in stages if stage.num_device_blocks is not None]
    if len(sizes) < len(stages):
        return None
    return DeviceTier(mode, len(stages), min(sizes), max(stage.block_copy_s for stage in stages))


def _oldest(needs: Mapping[str, int], max_blocks: int) -> dict[str, int]:
    """The oldest sequences that need `max_blocks` together; whoever does not fit waits, and those behind it too."""
    rotating: dict[str, int] = {}
    total_blocks = 0
    for sequence_id, blocks in needs.items():
        total_blocks += blocks
        if total_blocks > max_blocks:
            break
        rotating[sequence_id] = blocks
    return rotating
