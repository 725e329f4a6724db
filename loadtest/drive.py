"""Runs a workload against a live system and measures what a user would see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dejavu import AsyncClient, SamplingParams
from dejavu.errors import DejavuError
from loadtest.workload import WorkItem, Workload


@dataclass(slots=True)
class Trace:
    """Times of one request, in seconds on the monotonic clock."""

    due_s: float
    num_prompt_tokens: int
    token_times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.token_times_s[0] - self.due_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        times = self.token_times_s
        return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


async def drive(client: AsyncClient, workload: Workload, params: SamplingParams) -> tuple[list[Trace], float]:
    """Sends every request when it is due; returns their traces and the seconds until the last one ended."""
    start_s = time.monotonic()
    traces = [Trace(start_s + item.at_s, len(item.prompt)) for item in workload.items]
    async with asyncio.TaskGroup() as tasks:
        for item, trace in zip(workload.items, traces, strict=True):
            tasks.create_task(_one(client, item, trace, params))
    return traces, time.monotonic() - start_s


async def _one(client: AsyncClient, item: WorkItem, trace: Trace, params: SamplingParams) -> None:
    await asyncio.sleep(max(0.0, trace.due_s - time.monotonic()))
    own = msgspec.structs.replace(params, max_tokens=item.max_tokens)
    try:
        async for token in client.stream(list(item.prompt), own):
            trace.token_times_s.append(time.monotonic())
            trace.token_ids.append(token.id)
    except DejavuError as error:
        trace.error = f"{type(error).__name__}: {error}"


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between the closest ranks; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summarise(traces: Sequence[Trace], wall_s: float) -> dict[str, Any]:
    """Throughput, TTFT, TPOT and inter-token gaps (milliseconds) of a run."""
    num_output = sum(len(trace.token_ids) for trace in traces)
    figures: dict[str, Any] = {
        "wall_s": round(wall_s, 3),
        "num_requests": len(traces),
        "num_failed": sum(trace.error is not None for trace in traces),
        "first_error": next((trace.error for trace in traces if trace.error), None),
        "output_tokens": num_output,
        "output_tokens_per_s": round(num_output / wall_s, 1),
        "prompt_tokens_per_s": round(sum(trace.num_prompt_tokens for trace in traces) / wall_s, 1),
    }
    series = {
        "ttft": [t.ttft_s for t in traces if t.ttft_s is not None],
        "tpot": [t.tpot_s for t in traces if t.tpot_s is not None],
        "gap": [gap for t in traces for gap in t.gaps_s],
    }
    for name, values in series.items():
        for percent in (50, 99):
            value = percentile(values, percent)
            figures[f"{name}_p{percent}_ms"] = None if value is None else round(1e3 * value, 2)
    return figures
