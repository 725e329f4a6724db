"""How tokens are chosen and when a generation ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dejavu.errors import InvalidParameter, UnknownField

MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOKENS_LIMIT = 1 << 20


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parameters of one request, under the names people know; the defaults sample at temperature 1.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. None leaves `repetition_penalty` and
    `min_tokens` to the model's generation_config.json (else 1 and 0, which are off). `stop` strings (a single one
    becomes a list) are cut from the text; tokens of `stop_token_ids` and EOS are delivered, with empty text. These two
    are what `min_tokens` keeps from being drawn; a stop string ends the text however short it is.
    `durability` is "async", "lag:k" or "sync": how much of what precedes a token a cache store must have before the
    token is shown. Where no store can have it, tokens are shown all the same, unless `durability_strict`: then they
    wait for one, at most until the last token is there. Nothing is checked before `validate`.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: list[str] | str = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int | None = None
    logprobs: int | None = None
    durability: str | None = None
    durability_strict: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Parameters from names and values. Raises `UnknownField`, `InvalidParameter`."""
        for name in values:
            if name not in cls.__struct_fields__:
                raise UnknownField("there is no such parameter", field=name)
        params = cls(**values)
        params.validate()
        return params

    def validate(self, vocab_size: int | None = None) -> None:
        """Raises `InvalidParameter` naming the first field that is wrong."""
        self._check_integers()
        self._check_reals()
        self._check_stops(vocab_size)
        for name in ("ignore_eos", "durability_strict"):
            if type(getattr(self, name)) is not bool:
                raise InvalidParameter("must be true or false", field=name)
        if self.durability is not None and not is_durability(self.durability):
            raise InvalidParameter('must be "async", "lag:k" or "sync"', field="durability")

    def _check_integers(self) -> None:
        _check_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _check_integer("top_k", self.top_k, -1, 1 << 31)
        _check_integer("n", self.n, 1, MAX_CHOICES)
        if self.min_tokens is not None:
            _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, (1 << 63) - 1)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    def _check_reals(self) -> None:
        _check_real("temperature", self.temperature, 0.0, 100.0)
        _check_real("top_p", self.top_p, 0.0, 1.0, excludes_low=True)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        if self.repetition_penalty is not None:
            _check_real("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_real("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_real("frequency_penalty", self.frequency_penalty, -100.0, 100.0)

    def _check_stops(self, vocab_size: int | None) -> None:
        if not isinstance(self.stop, list) or len(self.stop) > MAX_STOPS:
            raise InvalidParameter(f"must be a string or at most {MAX_STOPS} strings", field="stop")
        for stop in self.stop:
            _check_stop(stop)
        if not isinstance(self.stop_token_ids, list) or len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidParameter(f"must be at most {MAX_STOP_TOKEN_IDS} token ids", field="stop_token_ids")
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, 0, (vocab_size or 1 << 31) - 1)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int:
        raise InvalidParameter(f"must be an integer, not {type(value).__name__}", field=name)
    if not low <= value <= high:
        raise InvalidParameter(f"must be between {low} and {high}", field=name)


def _check_real(name: str, value: object, low: float, high: float, excludes_low: bool = False) -> None:
    if type(value) not in (int, float):
        raise InvalidParameter(f"must be a number, not {type(value).__name__}", field=name)
    assert isinstance(value, int | float)
    if not low <= value <= high or (excludes_low and value == low):
        bounds = f"above {low:g} and at most {high:g}" if excludes_low else f"between {low:g} and {high:g}"
        raise InvalidParameter(f"must be {bounds}", field=name)


def _check_stop(stop: object) -> None:
    if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
        raise InvalidParameter(f"each must have 1 to {MAX_STOP_CHARS} characters", field="stop")
    try:
        stop.encode()
    except UnicodeEncodeError as error:
        raise InvalidParameter("is not valid Unicode (a lone surrogate)", field="stop") from error


def is_durability(value: object) -> bool:
    if not isinstance(value, str):
        return False
    kind, _, lag = value.partition(":")
    is_count = lag.isascii() and lag.isdecimal() and len(lag) <= 6
    return value in ("async", "sync") or (kind == "lag" and is_count)
