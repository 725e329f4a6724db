"""Which prompts the next chunk works on (pure).

Shortest-remaining-first keeps a short prompt from waiting behind a long one; a quarter of every chunk belongs to
the prompt that waits longest, so that a long one finishes under any stream of short ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

OLDEST_SHARE = 4


class PendingPrompt(NamedTuple):
    """`arrival` orders by age (smaller = older)."""

    sequence_id: str
    remaining_tokens: int
    arrival: int


def plan_chunk(pending: Iterable[PendingPrompt], budget_tokens: int) -> list[tuple[str, int]]:
    """(sequence_id, num_tokens) pairs that use up to `budget_tokens`; an empty list where nothing is pending."""
    prompts = sorted(pending, key=lambda prompt: (prompt.remaining_tokens, prompt.arrival))
    if not prompts or budget_tokens <= 0:
        return []
    oldest = min(prompts, key=lambda prompt: prompt.arrival)
    reserved = min(oldest.remaining_tokens, max(1, budget_tokens // OLDEST_SHARE))
    shares = {oldest.sequence_id: reserved}
    left = budget_tokens - reserved
    for prompt in prompts:
        already = shares.get(prompt.sequence_id, 0)
        share = min(prompt.remaining_tokens - already, left)
        if share > 0:
            shares[prompt.sequence_id] = already + share
            left -= share
    return list(shares.items())
