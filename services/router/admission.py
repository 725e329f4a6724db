"""What is let in (pure): each refusal is a typed error that names the field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

import msgspec

from common.model.spec import ModelSpec
from dejavu import wire
from dejavu.errors import (
    InvalidParameter,
    InvalidRequest,
    Overloaded,
    PromptEmpty,
    PromptTooLong,
    TokenOutOfRange,
    UnknownField,
)
from dejavu.params import SamplingParams
from dejavu.wire import MAX_PROMPT_BYTES, MAX_REQUEST_ID_CHARS, ClientMessage, Submit

MAX_LIVE_SEQUENCES = 4096
RETRY_AFTER_S = 1.0
_ANYTHING = msgspec.msgpack.Decoder()
HEAD_CHARS_PER_TOKEN = 16
"""Text has a quarter of that."""
_FIELDS = {str(kind.__struct_config__.tag): kind.__struct_fields__ for kind in get_args(ClientMessage)}


def check_form(submit: Submit, spec: ModelSpec, *, has_tokenizer: bool) -> None:
    """Everything that can be judged before the prompt is tokenised. Raises `DejavuError`."""
    if not submit.request_id or len(submit.request_id) > MAX_REQUEST_ID_CHARS:
        raise InvalidParameter(f"must have 1 to {MAX_REQUEST_ID_CHARS} characters", field="request_id")
    submit.params.validate(spec.vocab_size)
    if not submit.prompt:
        raise PromptEmpty("prompt is empty", field="prompt")
    if isinstance(submit.prompt, str):
        if not has_tokenizer:
            raise InvalidParameter("this model has no tokenizer: send token ids", field="prompt")
        if len(submit.prompt) > MAX_PROMPT_BYTES:
            raise PromptTooLong(f"prompt is longer than {MAX_PROMPT_BYTES} bytes", field="prompt")
    elif len(submit.prompt) > spec.max_context_tokens:
        raise _too_long(len(submit.prompt), submit.params.max_tokens, spec.max_context_tokens)
    if submit.params.stop and not has_tokenizer:
        raise InvalidParameter("this model has no tokenizer: use stop_token_ids", field="stop")
    if len(submit.delivered) > submit.params.n or any(len(ids) > submit.params.max_tokens for ids in submit.delivered):
        raise InvalidParameter("more delivered tokens than the request may have", field="delivered")


def check_tokens(
    prompt_ids: Sequence[int], delivered: Sequence[Sequence[int]], params: SamplingParams, spec: ModelSpec
) -> None:
    """Judges the token ids. Raises `DejavuError`."""
    if not prompt_ids:
        raise PromptEmpty("prompt has no tokens", field="prompt")
    for name, ids in [("prompt", prompt_ids), *(("delivered", ids) for ids in delivered)]:
        if ids and (min(ids) < 0 or max(ids) >= spec.vocab_size):
            bad = next(i for i in ids if not 0 <= i < spec.vocab_size)
            raise TokenOutOfRange(f"token id {bad} is outside 0..{spec.vocab_size - 1}", field=name)
    if len(prompt_ids) + params.max_tokens > spec.max_context_tokens:
        raise _too_long(len(prompt_ids), params.max_tokens, spec.max_context_tokens)


def check_head(num_tokens: int, spec: ModelSpec) -> None:
    """Judges a text by how many tokens its first `HEAD_CHARS_PER_TOKEN` characters per token of the context have: the
    rest need not be looked at then. What follows may cut the last word differently, hence the margin. Raises
    `PromptTooLong`."""
    if num_tokens > 2 * spec.max_context_tokens:
        raise PromptTooLong(
            f"the prompt's beginning alone has {num_tokens} tokens; the context has {spec.max_context_tokens}",
            field="prompt",
        )


def check_load(num_live_sequences: int, num_new: int) -> None:
    """Refuses what would make the queue unbounded. Raises `Overloaded`."""
    if num_live_sequences + num_new > MAX_LIVE_SEQUENCES:
        raise Overloaded(
            f"{num_live_sequences} sequences are live; the limit is {MAX_LIVE_SEQUENCES}",
            retry_after_s=RETRY_AFTER_S,
        )


def _too_long(num_prompt: int, max_tokens: int, max_context: int) -> PromptTooLong:
    return PromptTooLong(
        f"prompt ({num_prompt} tokens) + max_tokens ({max_tokens}) exceed the context of {max_context} tokens",
        field="prompt" if num_prompt >= max_context else "max_tokens",
    )


def malformed(reason: str, tag: str = "") -> InvalidRequest:
    """What a message of this tag that msgspec refused has done wrong, with the field that it names."""
    unknown = re.search(r"unknown field `(\w+)`", reason)
    if unknown is not None:
        return UnknownField("there is no such parameter", field=unknown[1])
    place = re.search(r"at `\$\[(\d+)\](?:\.(\w+))?", reason)
    return InvalidParameter(f"malformed message: {reason}", field=place and (place[2] or _field_at(tag, int(place[1]))))


def _field_at(tag: str, position: int) -> str | None:
    """Behind its tag, a message is its fields in order."""
    fields = _FIELDS.get(tag, ())
    return fields[position - 1] if 0 < position <= len(fields) else None


def outline(frame: memoryview) -> tuple[str, str]:
    """Tag and request id of a malformed submit ('' where they cannot be told)."""
    try:
        parts = wire.decode_strictly(_ANYTHING, frame)
    except msgspec.DecodeError:
        return "", ""
    told = [part if isinstance(part, str) else "" for part in parts[:2]] if isinstance(parts, list) else []
    tag, request_id = (*told, "", "")[:2]
    return tag, request_id[: wire.MAX_REQUEST_ID_CHARS]
