"""What `status` says: who lives, which pipelines are ready, counters and recent events."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from common.membership import MemberRecord, PipelineRecord
from common.succession import is_retired
from services.router.pipelines import is_spare
from services.router.placement import PipelineView

MAX_EVENTS = 1000


class Journal:
    """Counters and the latest events, stamped with CLOCK_MONOTONIC so that an outside clock can check them."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter(
            recoveries=0, recomputed_tokens=0, refused_frames=0, replica_lag_tokens=0, false_failovers=0,
            preemptions=0, recomputed_after_preemption_tokens=0,
        )  # fmt: skip
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)

    def note(self, kind: str, service: str, **details: Any) -> None:
        self._events.append({"at_monotonic_s": time.monotonic(), "kind": kind, "service": service, **details})

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(self._events)


def describe(
    members: Iterable[MemberRecord],
    published: Mapping[str, PipelineRecord],
    leader: str,
    pipelines: Iterable[PipelineView],
    stats: Mapping[str, Mapping[str, Any]],
    journal: Journal,
    live: Mapping[str, int],
) -> bytes:
    """The status document as JSON; `stats` are the services' own figures by name."""
    views = sorted(pipelines, key=lambda view: view.name)
    document = {
        "epoch": max((view.epoch for view in views), default=0),
        "leader": leader,
        "services": [
            _service(m, _state(m, leader, published), stats.get(m.name, {}))
            for m in sorted(members, key=lambda m: m.name)
        ],
        "pipelines": [
            {
                "name": view.name,
                "role": view.role,
                "ready": view.is_ready,
                "epoch": view.epoch,
                "capacity_tokens": view.capacity_tokens,
                "load_tokens": view.load_tokens,
            }
            for view in views
        ],
        "live": dict(live),
        "counters": _sums(journal.counters, stats.values()),
        "events": journal.events,
    }
    return json.dumps(document).encode()


def _sums(own: Mapping[str, int], stats: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The router's counters, with what the services counted under the same names."""
    sums = Counter(own)
    for counters in (figures.get("counters", {}) for figures in stats):
        sums.update({name: value for name, value in counters.items() if name in own})
    return dict(sums)


def _state(member: MemberRecord, leader: str, published: Mapping[str, PipelineRecord]) -> str:
    if member.role == "router":
        return "leader" if member.name == leader else "standby"
    if member.pipeline is None:
        return member.state
    if is_retired(member.pipeline, published):
        return "draining"
    return "standby" if is_spare(member, published) else "active"


def _service(member: MemberRecord, state: str, stats: Mapping[str, Any]) -> dict[str, Any]:
    is_spare_stage = member.pipeline is not None and state == "standby"
    described: dict[str, Any] = {
        "name": member.name,
        "role": "standby" if is_spare_stage else member.role,
        "pid": member.pid,
        "host": member.host,
        "pipeline": member.pipeline,
        "stage_index": member.stage_index,
        "num_stages": member.num_stages,
        "layers": None if member.layers is None else list(member.layers),
        "state": state,
        "incarnation": member.incarnation,
        "endpoint": member.endpoint,
    }
    return described | dict(stats)
