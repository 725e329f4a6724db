"""What is said of many runs: percentiles, limits, the moments of the strikes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from loadtest.chaos_table import summarise, table
from loadtest.history import Stream, detected_s
from loadtest.moments import TOO_LATE, Timing, await_moment, moment_of, timing_of


def run(detected: float | None, next_token: float, recomputed: int = 0, moment: str = "decode") -> dict[str, Any]:
    return {
        "detected_s": detected,
        "next_token_s": next_token,
        "recomputed_tokens": recomputed,
        "most_recomputed_tokens": 2 * recomputed // 16,
        "moment": moment,
        "anomalies": [],
    }


def fault(runs: list[dict[str, Any]], **limits: float | None) -> dict[str, Any]:
    return {"what": "kill -9", "runs": runs, "limits": limits, "summary": summarise(runs, 16)}


def stream(*times: float) -> Stream:
    return Stream("s", [], [(at_s, index, 7) for index, at_s in enumerate(times)])


def test_percentiles_are_by_nearest_rank() -> None:
    summary = summarise([run(0.01 * index, 1.0, index) for index in range(1, 201)], 16)
    assert (summary["detected_p50_s"], summary["detected_p99_s"]) == (1.0, 1.98)
    assert (summary["recomputed_per_stream_max"], summary["most_recomputed_tokens"]) == (12.5, 25)
    assert summary["protected_p99_s"] is None


@pytest.mark.parametrize(
    ("runs", "limits", "is_met"),
    [
        ([run(0.05, 0.4)], {"detected_s": 0.1}, True),
        ([run(0.05, 0.4), run(0.11, 0.4)], {"detected_s": 0.1}, False),
        ([run(0.05, 0.4), run(None, 0.4)], {"detected_s": 0.1}, False),
        ([run(None, 0.4)], {"next_token_s": 0.3}, False),
        ([run(None, 0.4)], {"protected_s": 10.0}, False),
        ([run(None, 0.4, 65)], {"recomputed_tokens": 4}, False),
        ([run(None, 0.4, 64)], {"recomputed_tokens": 4}, True),
    ],
)
def test_what_is_beyond_a_limit_is_bold(runs: list[dict[str, Any]], limits: dict[str, float], is_met: bool) -> None:
    """Also a limit on what no run has a figure of, or on how soon it is noticed, where once it was not."""
    assert ("**" in table({"faults": {"a": fault(runs, **limits)}})) is not is_met


def test_a_row_for_every_fault_that_was_run() -> None:
    runs = [run(0.05, 0.4, 8, "prefill"), run(0.07, 0.5, 16, "hand-off"), run(0.06, 0.3)]
    late = [*runs, run(None, 0.2, 800) | {"anomalies": ["a token twice"]}]
    limits = {"detected_s": 0.1, "next_token_s": 1.0, "recomputed_tokens": 4}
    rows = table({"faults": {"a": fault(runs, **limits), "b": {"runs": []}, "c": fault(late, **limits)}}).splitlines()
    assert rows[2:] == [
        "| kill -9 | 3 | 0.06 · 0.07 s (0.1) | 0.40 · 0.50 s (1) | 1.0 (4) · 2 | – |",
        "| kill -9 | 4 | **0.06 · 0.07 s (0.1)** | 0.30 · 0.50 s (1) | **50.0 (4)** · 100 |"
        " not noticed in 1; **anomalies: 1** |",
    ]


def test_who_was_noticed_last_counts() -> None:
    events = [
        {"kind": kind, "service": name, "at_monotonic_s": at_s}
        for kind, name, at_s in [
            ("detected", "a", 1.0),
            ("suspected", "a", 5.1),
            ("detected", "a", 5.2),
            ("detected", "b", 6.5),
            ("detected", "c", 9.0),
            ("detected", "a", 9.0),
        ]
    ]
    assert detected_s(events, {"a": 5.0, "b": 6.0}) == 0.5
    assert detected_s(events, {"d": 5.0}) is None


def test_moments_are_those_that_a_client_sees() -> None:
    assert moment_of([stream(), stream()]) == "prefill"
    assert moment_of([stream(1.0), stream()]) == "hand-off"
    assert moment_of([stream(1.0), stream(0.5, 2.0), stream()]) == "prefill"
    assert moment_of([stream(1.0, 3.0), stream(0.5, 2.0)]) == "decode"
    assert moment_of([stream(1.0), stream(0.1, 0.2)]) == "hand-off"
    over = stream(1.0, 3.0)
    over.ended = "finished"
    assert moment_of([over, stream(0.5, 2.0)]) == "decode"
    assert moment_of([over]) == TOO_LATE
    assert timing_of([stream(1.0, 4.0), stream(2.0, 3.0)], 0.5) == Timing(1.5, 3.5)


@pytest.mark.parametrize("aim", ["prefill", "hand-off"])
async def test_a_moment_is_waited_for(aim: str) -> None:
    """Nobody has begun: a hand-off cannot be met, the first prompt can."""
    late = [stream(1.0)] if aim == "hand-off" else [stream()]
    await await_moment(aim, late, random.Random(0), Timing(0.0, 1.0))
    assert moment_of(late) == aim
