"""The status document as text for people (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("NAME", "ROLE", "PID", "STATE", "STAGE", "LAYERS", "KV FREE/TOTAL", "LINK")
NOTHING = "-"


def render_status(status: Mapping[str, Any]) -> str:
    """A table of the services, and the counters that are not zero. What a server leaves out shows as `-`."""
    services = status.get("services", [])
    lines = [
        f"epoch {status.get('epoch', NOTHING)}, {len(services)} services",
        "",
        *_table([COLUMNS, *map(_row, services)]),
    ]
    swapping = [_swap_line(service) for service in services if service.get("swap")]
    if swapping:
        lines += ["", *swapping]
    counters = {name: count for name, count in status.get("counters", {}).items() if count}
    if counters:
        lines += ["", *_table([(name, str(count)) for name, count in sorted(counters.items())])]
    return "\n".join(lines)


def _row(service: Mapping[str, Any]) -> tuple[str, ...]:
    blocks = service.get("kv_blocks")
    layers = service.get("layers")
    stage = service.get("pipeline")
    if stage is not None and service.get("num_stages"):
        stage = f"{stage} {service.get('stage_index', 0) + 1}/{service['num_stages']}"
    return (
        _text(service.get("name")),
        _text(service.get("role")),
        _text(service.get("pid")),
        _text(service.get("state")),
        _text(stage),
        NOTHING if not layers else f"{layers[0]}..{layers[1] - 1}",
        NOTHING if not blocks else f"{_text(blocks.get('free'))}/{_text(blocks.get('total'))}",
        _text(service.get("link")),
    )


def _swap_line(service: Mapping[str, Any]) -> str:
    """What a token pipeline's device is used for, and why."""
    swap, device = service["swap"], service.get("device_kv_blocks") or {}
    used = f"{_text(device.get('resident'))} of {_text(device.get('total'))} device blocks, {swap.get('decision')}"
    if swap.get("forced"):
        return f"{service.get('pipeline')}: {used} (as told)"
    if "gain" not in swap:
        return f"{service.get('pipeline')}: {used} (all fit)"
    return (
        f"{service.get('pipeline')}: {used} (swapping would give {swap['gain']}x: "
        f"{swap['microbatch_swapping']} sequences in {swap['step_swapping_ms']} ms "
        f"against {swap['microbatch_resident']} in {swap['step_resident_ms']} ms; transfer {swap['transfer_ms']} ms)"
    )


def _text(value: object) -> str:
    return NOTHING if value is None or value == "" else str(value)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
