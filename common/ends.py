"""When a sequence ends (pure), the same wherever it is asked."""

from __future__ import annotations

from collections.abc import Collection

from dejavu.params import SamplingParams


def finish_reason(
    params: SamplingParams, eos_token_ids: Collection[int], token_id: int, num_output_tokens: int
) -> str | None:
    """What output token number `num_output_tokens` (from 1) means: "stop", "length", or None to go on."""
    is_eos = token_id in eos_token_ids and not params.ignore_eos
    if (is_eos or token_id in params.stop_token_ids) and num_output_tokens > (params.min_tokens or 0):
        return "stop"
    return "length" if num_output_tokens >= params.max_tokens else None
