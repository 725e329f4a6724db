"""Which pipelines the leader should publish (pure): complete ones whose stages changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from common.membership import MemberRecord, PipelineRecord
from common.succession import is_retired, not_over


def missing_pipelines(
    members: Iterable[MemberRecord],
    published: Mapping[str, PipelineRecord],
    draining: Collection[str] = (),
    broken: Collection[str] = (),
) -> list[PipelineRecord]:
    """Records to publish: every stage of the pipeline is registered, their layers join without a gap, and the
    incarnations differ from those published, or the pipeline is `broken`: it has lost a stage, which may be back. Where
    several stand ready for one stage, the one that is published stays, unless it is `draining`; the others are spares.
    Nobody forms a pipeline that is over. The epoch is that of the publication that each replaces, 0 for the first."""
    going_on = not_over(published)
    candidates: dict[str, dict[int, list[MemberRecord]]] = defaultdict(lambda: defaultdict(list))
    for member in members:
        # a new pipeline waits for those that are meant for it
        is_early = member.state == "standby" and member.pipeline not in going_on
        if member.pipeline is not None and member.stage_index is not None and not is_early:
            candidates[member.pipeline][member.stage_index].append(member)
    records = []
    for pipeline, found in sorted(candidates.items()):
        if is_retired(pipeline, published):
            continue
        last = published.get(pipeline)
        incarnations = [member.incarnation for member in last.stages] if pipeline in going_on and last else []
        stages = [_choose(found[index], incarnations, draining) for index in sorted(found)]
        has_changed = pipeline in broken or incarnations != [member.incarnation for member in stages]
        if has_changed and _is_complete(stages):
            records.append(PipelineRecord(pipeline, stages[0].role, last.epoch if last else 0, tuple(stages)))
    return records


def is_spare(member: MemberRecord, published: Mapping[str, PipelineRecord]) -> bool:
    """Whether a stage is warm but not part of its pipeline."""
    record = not_over(published).get(member.pipeline or "")
    return record is not None and all(stage.incarnation != member.incarnation for stage in record.stages)


def stand_in(member: MemberRecord, members: Iterable[MemberRecord], draining: Collection[str]) -> MemberRecord | None:
    """Who could take a stage's place."""
    place = (member.pipeline, member.stage_index)
    others = (other for other in members if (other.pipeline, other.stage_index) == place)
    return next((other for other in others if other is not member and other.incarnation not in draining), None)


def _choose(candidates: list[MemberRecord], incarnations: list[str], draining: Collection[str]) -> MemberRecord:
    """The published one, else the first by name; one that is draining only where there is no other."""
    return min(
        candidates,
        key=lambda member: (member.incarnation in draining, member.incarnation not in incarnations, member.name),
    )


def _is_complete(stages: list[MemberRecord]) -> bool:
    if [stage.stage_index for stage in stages] != list(range(stages[0].num_stages or 0)):
        return False
    ends = [stage.layers for stage in stages]
    return all(a is not None and b is not None and a[1] == b[0] for a, b in zip(ends, ends[1:], strict=False))
