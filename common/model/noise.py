"""The noise that sampling adds: a published function of (seed, choice, position, token id), without state.

Whoever knows those four numbers can draw the token again, on any machine, alone or in any batch:

    h = lane (token_id mod 4) of Philox4x32-10
        with the key (seed mod 2^32, seed div 2^32) and the counter (token_id div 4, position, choice, 0)
    u = (h + 1/2) / 2^32                      in float64, so 0 < u < 1
    noise = -log(-log(u))                     in float64: a standard Gumbel variable

Philox is from Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. Its integers are
computed in int64 without overflow, so numpy, torch on CPU and torch on CUDA give identical ones; only the
logarithms may differ in their last bit. Test vectors, h in hexadecimal (the first line is the authors' own):

    seed            choice  position  token ids 0, 1, 2, 3
    0               0       0         6627e8d5 e169c58d bc57ac4c 9b00dbd8
    81985529216486  3       1000      ea2cc02c f6534955 2c45ea78 1857e34c
    2^63 - 1        7       131071    593711f7 69f43294 032b8cdf ddfc46a0
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch

Word = TypeVar("Word", torch.Tensor, "np.ndarray[tuple[int, ...], np.dtype[np.int64]]")

_MASK = 0xFFFFFFFF
# the multipliers less 2^32: a 32-bit word times one of these stays within 63 bits, has the same low word, and
# a high word that is short by exactly the word itself
_M0 = 0xD2511F53 - (1 << 32)
_M1 = 0xCD9E8D57 - (1 << 32)
_W0 = 0x9E3779B9
_W1 = 0xBB67AE85
_NUM_ROUNDS = 10

MAX_GUMBEL = -math.log(-math.log1p(-(2.0**-33)))
"""No noise is larger."""
MIN_GUMBEL = -math.log(33 * math.log(2.0))
"""No noise is smaller."""


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10 of 32-bit words kept in int64 tensors or arrays that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        high0, high1 = (p0 >> 32) + c0, (p1 >> 32) + c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _MASK, high0 ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def gumbel(seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The float64 noise of each token id; all arguments are int64 of one shape and device."""
    lanes = _lanes(seed, choice, position, token_ids >> 2)
    return _to_gumbel(lanes.gather(-1, (token_ids & 3).unsqueeze(-1)).squeeze(-1))


def gumbel_of_vocabulary(
    seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """float64 [rows, vocab_size]: the noise of every token id, far cheaper; arguments int64 [rows]."""
    quads = torch.arange(-(-vocab_size // 4), device=seed.device)
    lanes = _lanes(seed[:, None], choice[:, None], position[:, None], quads[None])
    return _to_gumbel(lanes.flatten(1)[:, :vocab_size])


def _lanes(seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, quads: torch.Tensor) -> torch.Tensor:
    """int64 [..., 4]: the four words of each counter."""
    words = (quads, position, choice, torch.zeros_like(position), seed & _MASK, seed >> 32)
    if quads.device.type != "cpu":
        return torch.stack(philox(words[:4], words[4:]), dim=-1)
    # on a CPU, numpy needs half of torch's time for the same integers
    c0, c1, c2, c3, k0, k1 = (word.numpy() for word in words)
    return torch.from_numpy(np.stack(philox((c0, c1, c2, c3), (k0, k1)), axis=-1))


def _to_gumbel(words: torch.Tensor) -> torch.Tensor:
    uniform = (words.double() + 0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()
