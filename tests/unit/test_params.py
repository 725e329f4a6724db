import math
from typing import Any

import msgspec
import pytest

from dejavu import errors
from dejavu.errors import (
    DejavuError,
    InvalidParameter,
    Overloaded,
    RequestFailed,
    UnknownField,
    error_from_wire,
)
from dejavu.params import SamplingParams

WRONG: list[tuple[str, list[Any]]] = [
    ("max_tokens", [0, -1, 2**63, 10**5000, True, 1.0, "16", None]),
    ("temperature", [math.nan, math.inf, -math.inf, -0.1, 1e308, 10**400, True, "1", None]),
    ("top_p", [0, 0.0, 2, -1, math.nan, "1"]),
    ("top_k", [-5, -2, 2**40, 1.5, True]),
    ("min_p", [-0.1, 1.1, math.nan]),
    ("repetition_penalty", [0, -1, 1e-300, math.inf, math.nan]),
    ("presence_penalty", [math.nan, 1e308, True]),
    ("frequency_penalty", [math.nan, -1e308]),
    ("seed", [-1, 2**63, 1.0, True, "7"]),
    ("n", [0, 9, True]),
    ("stop", [[""], "", ["x" * 257], ["x"] * 17, 5, None, [5], ["\ud800"]]),
    ("stop_token_ids", [[-1], [2**40], [True], ["5"], 5, None, [1] * 65]),
    ("ignore_eos", [1, "yes", None]),
    ("min_tokens", [-1, 17, True]),
    ("logprobs", [-1, 21, True]),
    ("durability_strict", [1, "yes", None]),
    ("durability", ["", "lag", "lag:", "lag:-1", "lag:x", "lag:٣", "async:1", 5]),
]


@pytest.mark.parametrize(("name", "values"), WRONG, ids=[name for name, _ in WRONG])
def test_a_wrong_value_is_refused_and_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidParameter) as caught:
            SamplingParams.from_mapping({name: value})
        assert caught.value.field == name
        assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 1},
        {"seed": 2**63 - 1, "n": 8, "logprobs": 20, "min_tokens": 16},
        {"stop": ["x" * 256] * 16, "stop_token_ids": [0, 99]},
        {"durability": "lag:4"},
        {"durability": "sync", "durability_strict": True},
    ],
    ids=repr,
)
def test_right_values_pass(values: dict[str, Any]) -> None:
    SamplingParams.from_mapping(values).validate(vocab_size=100)


def test_stop_token_ids_lie_in_the_vocabulary() -> None:
    params = SamplingParams(stop_token_ids=[100])
    params.validate()
    params.validate(vocab_size=101)
    with pytest.raises(InvalidParameter, match="stop_token_ids"):
        params.validate(vocab_size=100)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(UnknownField) as caught:
        SamplingParams.from_mapping({"max_tokens": 4, "temprature": 1})
    assert caught.value.field == "temprature"


def test_one_stop_string_becomes_a_list_also_on_the_wire() -> None:
    assert SamplingParams(stop="end") == SamplingParams(stop=["end"])
    assert msgspec.json.decode(b'{"stop": "end"}', type=SamplingParams).stop == ["end"]


def test_defaults_are_not_sent_and_round_trip() -> None:
    assert msgspec.json.encode(SamplingParams()) == b"{}"
    params = SamplingParams(seed=5, stop="x", temperature=0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


LEAVES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DejavuError)]


@pytest.mark.parametrize("kind", [kind for kind in LEAVES if kind is not DejavuError])
def test_every_error_survives_the_wire(kind: type[DejavuError]) -> None:
    error = kind("too bad", field="prompt")
    code, message, field, details = error.to_wire()
    again = error_from_wire(code, message, field, details)
    assert (type(again), str(again), again.field) == (kind, "prompt: too bad", "prompt")
    assert kind.__name__ in (errors.__doc__ or "")


def test_codes_are_distinct_and_details_survive() -> None:
    assert len({kind.code for kind in LEAVES}) == len(LEAVES)
    overloaded = error_from_wire(*Overloaded("full", retry_after_s=2.5).to_wire())
    assert isinstance(overloaded, Overloaded)
    assert overloaded.retry_after_s == 2.5
    assert type(error_from_wire("from_the_future", "x", None, {})) is RequestFailed
