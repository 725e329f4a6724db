"""The noise that sampling adds: a published function of (seed, choice, position, token id), without state.

Whoever knows those four numbers can draw the token again, on any machine, alone or in any batch:

    h = lane (token_id mod 4) of Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011)
        with the key (seed mod 2^32, seed div 2^32)
        and the counter (token_id div 4, position, choice, 0)
    u = (h + 1/2) / 2^32                      in float64, so 0 < u < 1
    noise = -log(-log(u))                     in float64: a standard Gumbel variable

The integers are computed in int64 without ever overflowing it, so CPU and CUDA give identical ones; only the two
logarithms may differ in their last bit. Test vectors (h):

    seed                  choice  position  token ids 0, 1, 2, 3
    0                     0       0         6627e8d5 e169c58d bc57ac4c 9b00dbd8
    0x299f31d0a4093822    0       0x85a308d3, token ids 0x90fdaa20..: see `tests/unit/test_sampler.py`

The same values as the authors' known-answer tests: all zeros above; counter (243f6a88, 85a308d3, 13198a2e,
03707344) with key (a4093822, 299f31d0) gives d16cfe09 94fdcceb 5001e420 24126ea1.
"""

from __future__ import annotations

import math

import torch

_MASK = 0xFFFFFFFF
# the multipliers less 2^32: a 32-bit word times one of these fits in 63 bits, has the same low word, and its high
# word is short by exactly the word itself
_M0 = 0xD2511F53 - (1 << 32)
_M1 = 0xCD9E8D57 - (1 << 32)
_W0 = 0x9E3779B9
_W1 = 0xBB67AE85
_NUM_ROUNDS = 10

MAX_GUMBEL = -math.log(-math.log1p(-(2.0**-33)))
"""No noise is larger."""
MIN_GUMBEL = -math.log(33 * math.log(2.0))
"""No noise is smaller."""

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Philox4x32-10 of int64 tensors that hold 32-bit words and broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) + c2) ^ (c1 ^ k0),
            p1 & _MASK,
            ((p0 >> 32) + c0) ^ (c3 ^ k1),
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def gumbel(
    seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """float64 noise of each token id; the int64 arguments broadcast against each other."""
    zero = torch.zeros_like(position)
    lanes = philox((token_ids >> 2, position, choice, zero), (seed & _MASK, seed >> 32))
    lane = (token_ids & 3).expand(lanes[0].shape)
    words = torch.stack(lanes, dim=-1).gather(-1, lane.unsqueeze(-1)).squeeze(-1)
    return _to_gumbel(words)


def gumbel_of_vocabulary(
    seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """float64 [rows, vocab_size]: `gumbel` of every token id, four times cheaper; the arguments are int64 [rows]."""
    seed, choice, position = seed[:, None], choice[:, None], position[:, None]
    quads = torch.arange(-(-vocab_size // 4), device=seed.device)[None]
    zero = torch.zeros_like(position)
    lanes = philox((quads, position, choice, zero), (seed & _MASK, seed >> 32))
    return _to_gumbel(torch.stack(lanes, dim=-1).flatten(1)[:, :vocab_size])


def _to_gumbel(words: torch.Tensor) -> torch.Tensor:
    uniform = (words.double() + 0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()
