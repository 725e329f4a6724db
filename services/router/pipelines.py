"""Which pipelines the leader should publish (pure): complete ones whose stages changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from common.membership import MemberRecord, PipelineRecord


def missing_pipelines(members: Iterable[MemberRecord], published: Mapping[str, PipelineRecord]) -> list[PipelineRecord]:
    """Records to publish: every stage of the pipeline is registered, their layers join without a gap, and the
    incarnations differ from those published. The epoch is filled in by the store."""
    stages: dict[str, list[MemberRecord]] = defaultdict(list)
    for member in members:
        if member.pipeline is not None and member.stage_index is not None:
            stages[member.pipeline].append(member)
    records = []
    for pipeline, found in sorted(stages.items()):
        found.sort(key=lambda member: member.stage_index or 0)
        if not _is_complete(found):
            continue
        known = published.get(pipeline)
        incarnations = [member.incarnation for member in found]
        if known is None or [member.incarnation for member in known.stages] != incarnations:
            records.append(PipelineRecord(pipeline, found[0].role, 0, tuple(found)))
    return records


def _is_complete(stages: list[MemberRecord]) -> bool:
    if [stage.stage_index for stage in stages] != list(range(stages[0].num_stages or 0)):
        return False
    ends = [stage.layers for stage in stages]
    return all(a is not None and b is not None and a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
