"""What the runs of `loadtest.chaos` come to (pure): a summary of each fault, and the table of all in Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]

HEAD = (
    "fault",
    "n (struck in prefill, hand-off, decode)",
    "detected, median",
    "99 %",
    "next token, median",
    "99 %",
    "recomputed tokens per stream, worst run",
    "of one stream",
    "copies back, 99 %",
    "anomalies",
    "limits",
)
LIMITS = (("detected", "detected_p99_s"), ("next_token", "next_token_p99_s"), ("protected", "protected_p99_s"))


def summarise(runs: Sequence[Run], num_streams: int) -> dict[str, Any]:
    """Percentiles by nearest rank: with fewer than a hundred runs p99 is the worst."""
    figures: dict[str, Any] = {"runs": len(runs), "anomalies": sum(len(run["anomalies"]) for run in runs)}
    figures["moments"] = dict(Counter(run["moment"] for run in runs if "moment" in run))
    for name in ("detected", "next_token", "protected"):
        values = sorted(run[f"{name}_s"] for run in runs if run.get(f"{name}_s") is not None)
        figures |= {f"{name}_p50_s": _rank(values, 0.5), f"{name}_p99_s": _rank(values, 0.99)}
    figures["undetected"] = sum(run["detected_s"] is None for run in runs)
    # as token drivers count them, all streams together: the worst run's mean over its streams
    figures["recomputed_per_stream_max"] = max(run["recomputed_tokens"] for run in runs) / num_streams
    figures["most_recomputed_tokens"] = max(run.get("most_recomputed_tokens", 0) for run in runs)
    return figures


def table(document: Mapping[str, Any]) -> str:
    """A row for every fault that was run, with its limits and whether they were met."""
    rows = [HEAD, ("---",) * len(HEAD)]
    rows += [_row(fault) for fault in document["faults"].values() if fault["runs"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def verdict(fault: Mapping[str, Any]) -> list[str]:
    """Every limit of a fault, and whether it was met; a limit on what no run has a figure of is not."""
    summary, limits = fault["summary"], fault.get("limits", {})
    said = []
    for name, figure in LIMITS:
        limit_s, found_s = limits.get(f"{name}_s"), summary.get(figure)
        if limit_s is None:
            continue
        missing = summary["undetected"] if name == "detected" else 0
        is_met = found_s is not None and found_s <= limit_s and not missing
        said.append(f"{name.replace('_', ' ')} ≤ {limit_s:g} s {'met' if is_met else '**not met**'}")
    limit = limits.get("recomputed_tokens")
    if limit is not None:
        is_met = summary["recomputed_per_stream_max"] <= limit
        said.append(f"recomputed ≤ {limit} {'met' if is_met else '**not met**'}")
    return said


def _row(fault: Mapping[str, Any]) -> tuple[str, ...]:
    summary = fault["summary"]
    moments = [str(summary["moments"].get(name, 0)) for name in ("prefill", "hand-off", "decode")]
    return (
        fault["what"],
        f"{summary['runs']} ({', '.join(moments)})",
        _seconds(summary["detected_p50_s"]),
        _seconds(summary["detected_p99_s"]),
        _seconds(summary["next_token_p50_s"]),
        _seconds(summary["next_token_p99_s"]),
        f"{summary['recomputed_per_stream_max']:.1f}",
        str(summary.get("most_recomputed_tokens", "–")),
        _seconds(summary["protected_p99_s"]),
        str(summary["anomalies"]),
        "; ".join(verdict(fault)) or "–",
    )


def _rank(values: Sequence[float], share: float) -> float | None:
    return round(values[math.ceil(share * len(values)) - 1], 3) if values else None


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} s"
