"""Whether a pipeline may change its role (pure): the others must be able to do its work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from common.membership import PipelineRecord
from common.succession import is_retired
from dejavu.errors import InvalidParameter, Unavailable
from services.router.placement import PipelineView

ROLES = {"prompt": "prompt_stage", "token": "token_stage"}


def end_of_pipeline(
    pipeline: str,
    role: str,
    records: Mapping[str, PipelineRecord],
    views: Iterable[PipelineView],
    longest_tokens: int,
) -> PipelineRecord:
    """What to publish so that the processes of `pipeline` form its successor in `role` ("prompt" or "token"); the
    publication that is there already if this was asked for before. `longest_tokens` is what the longest of its live
    sequences needs. Raises `InvalidParameter` for what makes no sense, `Unavailable` for what cannot be now."""
    if role not in ROLES:
        raise InvalidParameter(f"must be prompt or token, not {role!r}", field="role")
    record = records.get(pipeline)
    if record is None:
        names = sorted(name for name in records if not is_retired(name, records))
        raise InvalidParameter(f"there is no pipeline of this name: {', '.join(names)}", field="pipeline")
    is_there = record.role == ROLES[role]
    if is_retired(pipeline, records):
        if is_there:
            raise InvalidParameter(f"{pipeline} has become {record.successor}", field="pipeline")
        return record
    if is_there:
        raise InvalidParameter(f"{pipeline} is a {role} pipeline already", field="role")
    if record.successor is not None:
        raise Unavailable(f"{pipeline} is about to begin")
    successor = _other_name(record)
    _check_others(record, views, longest_tokens)
    return msgspec.structs.replace(record, successor=successor)


def _other_name(record: PipelineRecord) -> str:
    detail = record.stages[0].detail
    if detail.get("colocated"):
        raise InvalidParameter(f"{record.pipeline} is colocated: it does both kinds of work", field="pipeline")
    other = str(detail.get("other_pipeline", ""))
    if not other:
        reason = "has no name in the other role: its stages were started without --other-pipeline"
        raise InvalidParameter(f"{record.pipeline} {reason}", field="pipeline")
    return other


def _check_others(record: PipelineRecord, views: Iterable[PipelineView], longest_tokens: int) -> None:
    others = [view for view in views if view.role == record.role and view.is_ready and view.name != record.pipeline]
    kind = record.role.removesuffix("_stage")
    if not others:
        raise Unavailable(f"no other {kind} pipeline is ready to take over from {record.pipeline}")
    room = max(view.capacity_tokens for view in others)
    if longest_tokens > room:
        raise Unavailable(
            f"a request on {record.pipeline} needs {longest_tokens} tokens, no other holds more than {room}"
        )
