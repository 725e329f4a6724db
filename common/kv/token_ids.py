"""Token ids as they travel and are kept: packed, little-endian int32, one after the other (pure)."""

from __future__ import annotations

import numpy as np

ID_BYTES = 4


def num_common(one: bytes, other: bytes) -> int:
    """How many tokens two sequences begin with in common."""
    limit = min(len(one), len(other)) // ID_BYTES
    differing = np.flatnonzero(
        np.frombuffer(one, dtype="<i4", count=limit) != np.frombuffer(other, dtype="<i4", count=limit)
    )
    return int(differing[0]) if len(differing) else limit
