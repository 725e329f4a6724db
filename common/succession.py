"""Which of its two pipelines a process belongs to (pure). It has one for either role, and goes from one to the other
when the leader publishes that the one is over and the other its successor. The latest word counts."""

from __future__ import annotations

from collections.abc import Mapping

from common.membership import PipelineRecord


def is_retired(pipeline: str, records: Mapping[str, PipelineRecord]) -> bool:
    """Whether the processes of `pipeline` are to form its successor instead."""
    record = records.get(pipeline)
    if record is None or record.successor is None:
        return False
    successor = records.get(record.successor)
    was_turned_back = successor is not None and successor.successor == pipeline and successor.epoch > record.epoch
    return not was_turned_back


def not_over(records: Mapping[str, PipelineRecord]) -> dict[str, PipelineRecord]:
    """The publications of pipelines that work, or are to work again."""
    return {name: record for name, record in records.items() if record.successor is None}
