"""Every error a user of DéjàVu can meet.

DejavuError
 ├─ InvalidRequest           the request itself is wrong; `field` names what
 │   ├─ InvalidParameter     a value is of the wrong type or out of range
 │   ├─ UnknownField         a parameter that does not exist
 │   ├─ PromptEmpty          no text, or no token
 │   ├─ PromptTooLong        prompt + max_tokens exceed the context, or the KV memory
 │   ├─ TokenOutOfRange      a token id outside the vocabulary
 │   ├─ RequestConflict      the id belongs to another live request
 │   └─ UnknownRequest       no such request
 ├─ Overloaded               the system is full; try again after `retry_after_s`
 ├─ Unavailable              nobody answers, or no pipeline is ready
 ├─ RequestFailed            the request was let in and could not be finished
 │   └─ StageLost            a stage died and nothing could take its place
 ├─ RequestCancelled         somebody cancelled the request
 ├─ ProtocolError            the other side says something that makes no sense
 └─ ConfigurationError       the system cannot start like this; the message says what to do
"""

from __future__ import annotations

from typing import Any, ClassVar


class DejavuError(Exception):
    """Base of all errors. `code` is stable and travels on the wire; `field` names the offending input."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message if self.field is None else f"{self.field}: {self.message}"

    @property
    def details(self) -> dict[str, float]:
        """Numbers that belong to the error."""
        return {}

    def to_wire(self) -> list[Any]:
        """[code, message, field, details], the shape of `dejavu.wire.WireError`."""
        return [self.code, self.message, self.field, self.details]


class InvalidRequest(DejavuError):
    code = "invalid_request"


class InvalidParameter(InvalidRequest):
    code = "invalid_parameter"


class UnknownField(InvalidRequest):
    code = "unknown_field"


class PromptEmpty(InvalidRequest):
    code = "prompt_empty"


class PromptTooLong(InvalidRequest):
    code = "context_exceeded"


class TokenOutOfRange(InvalidRequest):
    code = "token_out_of_range"


class RequestConflict(InvalidRequest):
    code = "request_conflict"


class UnknownRequest(InvalidRequest):
    code = "unknown_request"


class Overloaded(DejavuError):
    code = "overloaded"

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s

    @property
    def details(self) -> dict[str, float]:
        return {"retry_after_s": self.retry_after_s}


class Unavailable(DejavuError):
    code = "unavailable"


class RequestFailed(DejavuError):
    code = "request_failed"


class StageLost(RequestFailed):
    code = "stage_lost"


class RequestCancelled(DejavuError):
    code = "request_cancelled"


class ProtocolError(DejavuError):
    code = "protocol_error"


class ConfigurationError(DejavuError):
    code = "configuration_error"


_LEAVES: tuple[type[DejavuError], ...] = (
    InvalidRequest,
    InvalidParameter,
    UnknownField,
    PromptEmpty,
    PromptTooLong,
    TokenOutOfRange,
    RequestConflict,
    UnknownRequest,
    Overloaded,
    Unavailable,
    RequestFailed,
    StageLost,
    RequestCancelled,
    ProtocolError,
    ConfigurationError,
)
_BY_CODE = {leaf.code: leaf for leaf in _LEAVES}


def error_from_wire(code: str, message: str, field: str | None, details: dict[str, float]) -> DejavuError:
    """The error that `to_wire` described; an unknown code becomes `RequestFailed`."""
    kind = _BY_CODE.get(code, RequestFailed)
    if kind is Overloaded:
        return Overloaded(message, field=field, retry_after_s=details.get("retry_after_s", 1.0))
    return kind(message, field=field)
