"""What a router says about a message that is none."""

from __future__ import annotations

import msgspec
import pytest

from dejavu import wire
from dejavu.errors import InvalidParameter, UnknownField
from services.router.admission import malformed

SUBMIT = ["submit", "r", [5], {}, [[6]]]


@pytest.mark.parametrize(
    ("position", "value", "field"),
    [
        (1, 5, "request_id"),
        (2, None, "prompt"),
        (2, 5, "prompt"),
        (2, [1.5], "prompt"),
        (2, [[5]], "prompt"),
        (2, {"a": 1}, "prompt"),
        (3, [1], "params"),
        (3, None, "params"),
        (3, {"temperature": "hot"}, "temperature"),
        (3, {"stop_token_ids": ["x"]}, "stop_token_ids"),
        (4, "x", "delivered"),
        (4, [[None]], "delivered"),
        (0, "dance", None),
    ],
)
def test_the_field_of_a_wrong_type_is_named(position: int, value: object, field: str | None) -> None:
    message = [*SUBMIT[:position], value, *SUBMIT[position + 1 :]]
    with pytest.raises(msgspec.DecodeError) as refused:
        wire.decode_client_message(msgspec.msgpack.encode(message))
    error = malformed(str(refused.value), str(message[0]))
    assert type(error) is InvalidParameter and error.field == field


def test_a_field_that_does_not_exist_is_named() -> None:
    with pytest.raises(msgspec.DecodeError) as refused:
        wire.decode_client_message(msgspec.msgpack.encode([*SUBMIT[:3], {"warmth": 1}]))
    error = malformed(str(refused.value), "submit")
    assert type(error) is UnknownField and error.field == "warmth"
