"""What clients saw of a run with a fault, and what is wrong with it (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ETCD = "etcd"
"""Its name in `events`. That it was missed is no fail-over: it is no service, and nobody is replaced for it."""


@dataclass(slots=True)
class Stream:
    """One choice of one request. `expected` is what a run without a fault delivers."""

    name: str
    expected: list[int]
    tokens: list[tuple[float, int, int]] = field(default_factory=list)
    """(monotonic time, index, id), in the order of delivery"""
    ended: str | None = None
    """"finished", or what went wrong; None: it never ended"""

    def longest_gap_s(self, from_s: float) -> float:
        """The longest time without a token that reaches beyond `from_s`."""
        times = [at_s for at_s, _, _ in self.tokens]
        return max((b - a for a, b in zip(times, times[1:], strict=False) if b >= from_s), default=0.0)


@dataclass(slots=True)
class History:
    """A run: its streams, what `status` said before and after, whom the fault struck."""

    streams: list[Stream]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    struck: Sequence[str]
    fault_at_s: float
    max_recomputed_tokens: int | None = None
    """per stream; None: any number is allowed"""


@dataclass(frozen=True, slots=True)
class Anomaly:
    """`name` is one of lost, duplicated, reordered, phantom, divergent, stuck, failed, leaked, over-recomputed,
    false fail-over, zombie accepted."""

    name: str
    where: str
    detail: str


def check(history: History) -> list[Anomaly]:
    """Everything that must not be."""
    return [
        *(anomaly for stream in history.streams for anomaly in check_stream(stream)),
        *leaks(history.after),
        *_recomputation(history),
        *_false_failovers(history),
        *_zombies(history),
    ]


def check_stream(stream: Stream) -> list[Anomaly]:
    """What is wrong with one stream."""
    found: list[Anomaly] = []
    seen: dict[int, int] = {}
    last = -1
    for _, index, token_id in stream.tokens:
        if index in seen:
            found.append(Anomaly("duplicated", stream.name, f"index {index} came twice"))
        elif index < last:
            found.append(Anomaly("reordered", stream.name, f"index {index} came after {last}"))
        if index >= len(stream.expected):
            found.append(Anomaly("phantom", stream.name, f"index {index} of {len(stream.expected)}"))
        elif token_id != stream.expected[index]:
            found.append(Anomaly("divergent", stream.name, f"index {index}: {token_id}, not {stream.expected[index]}"))
        seen.setdefault(index, token_id)
        last = max(last, index)
    if stream.ended is None:
        return [*found, Anomaly("stuck", stream.name, f"no end after {len(stream.tokens)} tokens")]
    if stream.ended != "finished":
        return [*found, Anomaly("failed", stream.name, stream.ended)]
    missing = [index for index in range(len(stream.expected)) if index not in seen]
    if missing:
        found.append(Anomaly("lost", stream.name, f"{len(missing)} tokens, the first at index {missing[0]}"))
    return found


def leaks(after: Mapping[str, Any]) -> list[Anomaly]:
    """Blocks that are held though nothing is live."""
    found = []
    for service in after["services"]:
        blocks = service.get("kv_blocks")
        if blocks and (blocks["free"] != blocks["total"] or blocks["quarantined"]):
            found.append(Anomaly("leaked", service["name"], f"{blocks} with nothing live"))
    return found


def _recomputation(history: History) -> list[Anomaly]:
    if history.max_recomputed_tokens is None:
        return []
    recomputed = recomputed_tokens(history.before, history.after)
    allowed = history.max_recomputed_tokens * len(history.streams)
    return [Anomaly("over-recomputed", "", f"{recomputed} tokens")] if recomputed > allowed else []


def detected_s(events: Iterable[Mapping[str, Any]], struck_at_s: Mapping[str, float]) -> float | None:
    """How long it took until the last of those that were struck was noticed; None where no one was."""
    noticed: dict[str, float] = {}
    for event in events:
        name, at_s = event["service"], event["at_monotonic_s"]
        if event["kind"] == "detected" and name in struck_at_s and at_s >= struck_at_s[name]:
            noticed.setdefault(name, at_s - struck_at_s[name])
    return max(noticed.values(), default=None)


def recomputed_tokens(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Counted by the drivers; one that died takes its count along."""
    total: int = after["counters"]["recomputed_tokens"]
    return max(0, total - _surviving(before, after))


def most_recomputed_tokens(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Of one stream. Drivers keep it for their epoch: one that has not grown in the same epoch is of an older fault."""
    known = [service["recovery"] for service in before["services"] if "recovery" in service]
    found = [service["recovery"] for service in after["services"] if "recovery" in service]
    return max((each["most_recomputed_tokens"] for each in found if each not in known), default=0)


def _surviving(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """What was counted before the fault by services that still live."""
    living = {(service["name"], service["incarnation"]) for service in after["services"]}
    counts: Iterable[int] = (
        service.get("counters", {}).get("recomputed_tokens", 0)
        for service in before["services"]
        if (service["name"], service["incarnation"]) in living
    )
    return sum(counts)


def _false_failovers(history: History) -> list[Anomaly]:
    return [
        Anomaly("false fail-over", event["service"], str(event))
        for event in history.after["events"]
        if event["kind"] in ("detected", "suspected")
        and event["at_monotonic_s"] >= history.fault_at_s
        and event["service"] not in (*history.struck, ETCD)
    ]


def _zombies(history: History) -> list[Anomaly]:
    """Hand-offs whose bytes were not what their writer had sent, where nobody meant to damage any: somebody else wrote
    to the blocks after they had been given away."""
    known = {(service["name"], service["incarnation"]): _num_corrupt(service) for service in history.before["services"]}
    return [
        Anomaly("zombie accepted", service["name"], f"{count} hand-offs were overwritten by somebody else")
        for service in history.after["services"]
        if (count := _num_corrupt(service) - known.get((service["name"], service["incarnation"]), 0)) > 0
    ]


def _num_corrupt(service: Mapping[str, Any]) -> int:
    """Hand-offs whose checksum did not hold."""
    count: int = service.get("handoff", {}).get("corrupt", 0)
    return count
