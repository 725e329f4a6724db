"""What the runs of `loadtest.chaos` come to (pure): a summary of each fault, and the table of all in Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]

HEAD = (
    "fault",
    "runs",
    "noticed: median · 99 % (limit)",
    "longest gap: median · 99 % (limit)",
    "tokens computed again per stream, worst run (limit) · of one stream",
    "besides",
)
FIGURES = ("detected", "next_token", "protected")


def summarise(runs: Sequence[Run], num_streams: int) -> dict[str, Any]:
    """Percentiles by nearest rank: with fewer than a hundred runs p99 is the worst."""
    figures: dict[str, Any] = {"runs": len(runs), "anomalies": sum(len(run["anomalies"]) for run in runs)}
    figures["moments"] = dict(Counter(run["moment"] for run in runs if "moment" in run))
    for name in FIGURES:
        values = sorted(run[f"{name}_s"] for run in runs if run.get(f"{name}_s") is not None)
        figures |= {f"{name}_p50_s": _rank(values, 0.5), f"{name}_p99_s": _rank(values, 0.99)}
    figures["undetected"] = sum(run["detected_s"] is None for run in runs)
    # as token drivers count them, all streams together: the worst run's mean over its streams
    figures["recomputed_per_stream_max"] = max(run["recomputed_tokens"] for run in runs) / num_streams
    figures["most_recomputed_tokens"] = max(run.get("most_recomputed_tokens", 0) for run in runs)
    return figures


def table(document: Mapping[str, Any]) -> str:
    """A row for every fault that was run; what is beyond a limit is bold."""
    rows = [HEAD, ("---",) * len(HEAD)]
    rows += [_row(fault) for fault in document["faults"].values() if fault["runs"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _is_met(fault: Mapping[str, Any], key: str) -> bool:
    """A limit on what no run has a figure of is not met, nor one on how soon a fault is noticed that once was not."""
    summary, limit = fault["summary"], fault.get("limits", {}).get(key)
    if limit is None:
        return True
    if key == "recomputed_tokens":
        return bool(summary["recomputed_per_stream_max"] <= limit)
    found_s = summary[f"{key.removesuffix('_s')}_p99_s"]
    return found_s is not None and found_s <= limit and not (key == "detected_s" and summary["undetected"])


def _row(fault: Mapping[str, Any]) -> tuple[str, ...]:
    summary = fault["summary"]
    computed = f"{summary['recomputed_per_stream_max']:.1f}{_limit(fault, 'recomputed_tokens')}"
    most = summary.get("most_recomputed_tokens")
    return (
        fault["what"],
        str(summary["runs"]),
        _times(fault, "detected"),
        _times(fault, "next_token"),
        _marked(fault, "recomputed_tokens", computed) + ("" if most is None else f" · {most}"),
        "; ".join(_besides(fault)) or "–",
    )


def _besides(fault: Mapping[str, Any]) -> list[str]:
    summary = fault["summary"]
    is_protected = summary["protected_p99_s"] is not None or fault.get("limits", {}).get("protected_s") is not None
    said = [f"copies are back after {_times(fault, 'protected')}"] * is_protected
    is_to_be_noticed = fault.get("limits", {}).get("detected_s") is not None
    said += [f"not noticed in {summary['undetected']}"] * bool(is_to_be_noticed and summary["undetected"])
    return said + [f"**anomalies: {summary['anomalies']}**"] * bool(summary["anomalies"])


def _times(fault: Mapping[str, Any], name: str) -> str:
    median_s, p99_s = (fault["summary"][f"{name}_{rank}_s"] for rank in ("p50", "p99"))
    found = "–" if p99_s is None else f"{median_s:.2f} · {p99_s:.2f} s"
    return _marked(fault, f"{name}_s", f"{found}{_limit(fault, f'{name}_s')}")


def _limit(fault: Mapping[str, Any], key: str) -> str:
    limit = fault.get("limits", {}).get(key)
    return "" if limit is None else f" ({limit:g})"


def _marked(fault: Mapping[str, Any], key: str, text: str) -> str:
    return text if _is_met(fault, key) else f"**{text}**"


def _rank(values: Sequence[float], share: float) -> float | None:
    return round(values[math.ceil(share * len(values)) - 1], 3) if values else None
