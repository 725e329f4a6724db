"""The noise of sampling, as a published function of (seed, choice, position, token id): nothing to carry along.

All arithmetic is on 32-bit unsigned integers, so that every device computes the same ones. With

    mix(x) = x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B; x ^= x >> 16      ("lowbias32")

the key of a draw is  k = mix(mix(mix(mix(seed_low) ^ seed_high) ^ choice) ^ position),  and token t gets
h = mix(mix(t ^ k) + k),  u = (h + 0.5) / 2^32,  gumbel = -log(-log(u))  in float64.

Test vectors (seed 1234567890123, choice 1, position 17): see tests/unit/test_sampler.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
MAX_GUMBEL = 22.88
"""no draw is larger: u is at most 1 - 2^-33"""


def _mix_int(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & _MASK
    x ^= x >> 15
    x = x * 0x846CA68B & _MASK
    return x ^ x >> 16


def _mix(x: Tensor) -> Tensor:
    """int64 tensors that hold 32-bit values; products wrap modulo 2^64, which keeps the low 32 bits right."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def draw_key(seed: int, choice: int, position: int) -> int:
    """The 32-bit key of one draw."""
    key = _mix_int(seed & _MASK)
    for part in (seed >> 32 & _MASK, choice & _MASK, position & _MASK):
        key = _mix_int(key ^ part)
    return key


def gumbel(key: int, token_ids: Tensor) -> Tensor:
    """float64 noise for each of `token_ids` (int64, any shape)."""
    hashed = _mix((_mix(token_ids ^ key) + key) & _MASK)
    uniform = (hashed.to(torch.float64) + 0.5) / 2**32
    return -torch.log(-torch.log(uniform))
