"""What client and router say to each other: MessagePack frames of tagged, validated structs.

One ZeroMQ message is one frame: an encoded member of `ClientMessage` (client to router) or `RouterMessage`
(router to client). Structs are encoded as arrays whose first element is the tag. The client speaks through a
DEALER socket whose routing id is its `client_id`; the router through a ROUTER socket.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dejavu.params import SamplingParams

PROTOCOL_VERSION = 2
MAX_MESSAGE_BYTES = 8 << 20
"""Limit of one message in either direction; a peer that sends more is cut."""
MAX_PROMPT_BYTES = 4 << 20
MAX_REQUEST_ID_CHARS = 128
PING_INTERVAL_S = 0.5


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The first message of a connection, sent again after every reconnect."""

    protocol_version: int


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """Asks for a generation. `prompt` is text or token ids; `delivered` holds, per choice, the token ids the
    client already has (a resubmission after every server forgot the request): they are forced, not sampled.
    `params.seed` is always set: a client draws one where the user gave none."""

    request_id: str
    prompt: str | list[int]
    params: SamplingParams
    delivered: list[list[int]] = []


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    request_id: str


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """Sent every `PING_INTERVAL_S` while requests are live; silence ends the client's requests."""


class StatusQuery(msgspec.Struct, frozen=True, array_like=True, tag="status"):
    query_id: int


class Drain(msgspec.Struct, frozen=True, array_like=True, tag="drain"):
    """Asks the leader to have others take over from a service and to end it."""

    query_id: int
    name: str


class Convert(msgspec.Struct, frozen=True, array_like=True, tag="convert"):
    """Asks the leader to turn a pipeline into one of another `role`: "prompt" or "token"."""

    query_id: int
    pipeline: str
    role: str


ClientMessage = Hello | Submit | Cancel | Ping | StatusQuery | Drain | Convert


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """`routers` are the endpoints of all routers, `leader` the one that takes requests ('' = none yet)."""

    protocol_version: int
    routers: list[str]
    leader: str
    model: str
    vocab_size: int
    max_context_tokens: int


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag="accepted"):
    request_id: str
    num_prompt_tokens: int


class TokenFrame(msgspec.Struct, frozen=True, array_like=True):
    """One delivered token. `text` is what it adds to the choice's text ('' while a code point or a possible
    stop string is incomplete); `finish_reason` ("stop" | "length") is set on the choice's last token."""

    request_id: str
    choice: int
    epoch: int
    index: int
    token_id: int
    text: str
    finish_reason: str | None = None
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] = []


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    frames: list[TokenFrame]


class WireError(msgspec.Struct, frozen=True, array_like=True):
    """An error of `dejavu.errors` on the wire; see `dejavu.errors.error_from_wire`."""

    code: str
    message: str
    field: str | None = None
    details: dict[str, float] = {}


class Ended(msgspec.Struct, frozen=True, array_like=True, tag="ended"):
    """The one end of a request: `outcome` is "finished", "failed" or "cancelled"; `error` says why it failed.
    `num_output_tokens` counts those that were delivered before a resubmission, too."""

    request_id: str
    outcome: str
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: WireError | None = None


class NotLeader(msgspec.Struct, frozen=True, array_like=True, tag="not_leader"):
    """This router does not take requests; resubmit to `leader` ('' = no leader yet, ask again)."""

    request_id: str
    leader: str


class Pong(msgspec.Struct, frozen=True, array_like=True, tag="pong"):
    """Answers `Ping`."""


class StatusReply(msgspec.Struct, frozen=True, array_like=True, tag="status_reply"):
    query_id: int
    status_json: bytes


class Drained(msgspec.Struct, frozen=True, array_like=True, tag="drained"):
    """Answers `Drain` when it is done, or cannot be."""

    query_id: int
    error: WireError | None = None


class Converted(msgspec.Struct, frozen=True, array_like=True, tag="converted"):
    """Answers `Convert` when the pipeline works under its new name, `pipeline`, or cannot."""

    query_id: int
    pipeline: str
    error: WireError | None = None


RouterMessage = Welcome | Accepted | Tokens | Ended | NotLeader | Pong | StatusReply | Drained | Converted

_encoder = msgspec.msgpack.Encoder()
_client_decoder = msgspec.msgpack.Decoder(ClientMessage)
_router_decoder = msgspec.msgpack.Decoder(RouterMessage)


def encode(message: ClientMessage | RouterMessage) -> bytes:
    """The message's one frame."""
    return _encoder.encode(message)


def decode_client_message(frame: bytes | memoryview) -> ClientMessage:
    """What a client sent. Raises `msgspec.DecodeError` (its subclass `ValidationError` for wrong types)."""
    message: ClientMessage = decode_strictly(_client_decoder, frame)
    return message


def decode_router_message(frame: bytes | memoryview) -> RouterMessage:
    """What a router sent. Raises `msgspec.DecodeError`."""
    message: RouterMessage = decode_strictly(_router_decoder, frame)
    return message


def decode_strictly(decoder: msgspec.msgpack.Decoder[Any], frame: bytes | memoryview) -> Any:
    """Raises `msgspec.DecodeError` for strings that are no UTF-8, too, and for what is nested too deeply."""
    try:
        return decoder.decode(frame)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
