"""What the watch of members tells, as a pure function of what etcd says."""

from __future__ import annotations

import msgspec
import pytest

from common.membership import GONE, MemberJoined, MemberLost, MemberRecord, Roster

A = MemberRecord("a", "router", "1", 7, "h", "tcp://h:1", None, None, None, None, "active")
A_AGAIN = msgspec.structs.replace(A, incarnation="2")
B = msgspec.structs.replace(A, name="b")


def test_joins_and_losses() -> None:
    roster = Roster()
    assert roster.put(A) == [MemberJoined(A)]
    assert roster.put(A) == []
    assert roster.put(A_AGAIN) == [MemberLost(A), MemberJoined(A_AGAIN)]
    assert roster.delete("unknown", is_settled=True) == []
    assert roster.delete("a", is_settled=True) == [MemberLost(A_AGAIN)]
    assert roster.delete("a", is_settled=True) == []


def test_after_an_outage_nobody_is_lost_before_things_have_settled() -> None:
    roster = Roster()
    roster.replace([A, B], is_settled=True)
    assert roster.delete("a", is_settled=False) == []
    assert roster.replace([], is_settled=False) == []
    assert roster.put(A) == []
    assert roster.settle() == [MemberLost(B)]
    assert roster.members == {"a": A}


def test_who_is_said_to_be_gone_is_lost_at_once() -> None:
    roster = Roster()
    gone = msgspec.structs.replace(A, state=GONE)
    assert roster.put(gone) == [], "the list of the beginning may still hold it"
    roster.replace([A, B], is_settled=False)
    roster.delete("a", is_settled=False)
    assert roster.put(gone) == [MemberLost(A)]
    assert roster.delete("a", is_settled=False) == roster.settle() == []
    assert roster.put(A) == [MemberJoined(A)], "it was taken for dead, and is not"


def test_who_comes_back_as_another_incarnation_was_lost() -> None:
    roster = Roster()
    roster.put(A)
    roster.delete("a", is_settled=False)
    assert roster.put(A_AGAIN) == [MemberLost(A), MemberJoined(A_AGAIN)]
    assert roster.settle() == []


def test_a_new_list_replaces_the_old_one() -> None:
    roster = Roster()
    roster.put(A)
    assert roster.replace([B], is_settled=True) == [MemberJoined(B), MemberLost(A)]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a/b"},
        {"endpoint": "garbage"},
        {"pid": -1},
        {"detail": {str(number): 1 for number in range(33)}},
        {"detail": {"key": ["nested"]}},
        {"layers": [1, 2, 3]},
    ],
)
def test_records_out_of_bounds_are_refused(change: dict[str, object]) -> None:
    value = msgspec.json.encode(msgspec.structs.asdict(A) | change)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(value, type=MemberRecord)
