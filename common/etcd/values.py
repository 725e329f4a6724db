"""Values read from etcd are untrusted: what cannot be decoded is ignored, with a log line."""

from __future__ import annotations

import logging
from typing import TypeVar

import msgspec

logger = logging.getLogger(__name__)

MAX_VALUE_BYTES = 512 * 1024

Value = TypeVar("Value")


def decode_value(key: str, value: bytes, kind: type[Value]) -> Value | None:
    """The JSON `value` as `kind`, or None where it is something else."""
    try:
        if len(value) > MAX_VALUE_BYTES:
            raise msgspec.ValidationError(f"{len(value)} bytes are too many")
        return msgspec.json.decode(value, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        logger.warning("ignoring the value of %s: %s", key, error)
        return None
