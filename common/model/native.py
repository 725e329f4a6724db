"""Kernels in C for the token step on CPUs: what torch lacks (attention that reads KV blocks where they are) or does in
many small calls. Built with the machine's C compiler on first use and kept in the user's cache folder; without a
compiler everything runs on torch alone.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from common.c_library import build_library
from common.model.plan import TokenTable

LANES = 16
"""The kernels work on multiples of so many elements."""

_SOURCE = Path(__file__).with_name("kernels.c")
# not -ffast-math: linking it switches denormals off for the whole process
_FLAGS = "-fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math -Wno-psabi"
_P, _N, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "add_norm": [_P, _P, _P, _P, _P, _N, _N, _F, _I],
    "gated_silu": [_P, _P, _N, _I],
    "rotate_and_store": [_P, _P, _P, _P, _P, _F, _P, _P, _P, _N, _N, _N, _N, _I],
    "attend_tokens": [_P, _N, _P, _P, _P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _N, _F, _P, _I],
}

logger = logging.getLogger(__name__)


class Kernels:
    """The library for one dtype. All tensors are contiguous, on the CPU and of that dtype unless said otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self._library = library

    def norm(self, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMS norm of hidden [rows, size]."""
        output = torch.empty_like(hidden)
        self._library.add_norm(
            hidden.data_ptr(),
            None,
            None,
            weight.data_ptr(),
            output.data_ptr(),
            *hidden.shape,
            epsilon,
            torch.get_num_threads(),
        )
        return output

    def add_norm(self, hidden: Tensor, added: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """hidden + added, and its RMS norm."""
        total, output = torch.empty_like(hidden), torch.empty_like(hidden)
        self._library.add_norm(
            hidden.data_ptr(), added.data_ptr(), total.data_ptr(), weight.data_ptr(), output.data_ptr(),
            *hidden.shape, epsilon, torch.get_num_threads(),
        )  # fmt: skip
        return total, output

    def gated_silu_(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, in place of `gate`."""
        self._library.gated_silu(gate.data_ptr(), up.data_ptr(), gate.numel(), torch.get_num_threads())
        return gate

    def rotate_and_store_(
        self, fused: Tensor, cosine: Tensor, sine: Tensor, norms: tuple[Tensor, Tensor] | None, epsilon: float,
        pool: tuple[Tensor, Tensor], slots: Tensor,
    ) -> None:  # fmt: skip
        """fused [rows, heads + 2 kv_heads, dim] holds query, key and value: queries are rotated in place, rotated keys
        and values go to `slots` [rows] (int64) of the pool's layer. cosine and sine [rows, dim]; `norms` are the
        weights [dim] of RMS norms of query and key."""
        keys, values = pool
        num_kv_heads = keys.shape[-2]
        query_norm, key_norm = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
        self._library.rotate_and_store(
            fused.data_ptr(), cosine.data_ptr(), sine.data_ptr(), query_norm, key_norm, epsilon, keys.data_ptr(),
            values.data_ptr(), slots.data_ptr(), fused.shape[0], fused.shape[1] - 2 * num_kv_heads, num_kv_heads,
            fused.shape[2], torch.get_num_threads(),
        )  # fmt: skip

    def attend_tokens_(
        self, query: Tensor, output: Tensor, pool: tuple[Tensor, Tensor], tokens: TokenTable, scale: float,
        slopes: Tensor | None,
    ) -> None:  # fmt: skip
        """query [rows, heads, dim] -> the tokens' rows of output [rows, heads, dim]. `slopes`
        [heads], float32, turns ALiBi on."""
        keys, values = pool
        if query.stride()[1:] != (query.shape[2], 1):
            query = query.contiguous()
        _, block_size, num_kv_heads, head_dim = keys.shape
        self._library.attend_tokens(
            query.data_ptr(), query.stride(0), output.data_ptr(), keys.data_ptr(), values.data_ptr(),
            tokens.rows.data_ptr(), tokens.tables.data_ptr(), tokens.starts.data_ptr(), tokens.lengths.data_ptr(),
            tokens.blocks.data_ptr(), block_size, tokens.rows.shape[0], query.shape[1], num_kv_heads, head_dim, scale,
            None if slopes is None else slopes.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip


@functools.cache
def load_kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for a dtype; None where they cannot be built."""
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        return Kernels(ctypes.CDLL(str(_build(dtype))))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no native kernels, so token steps are slower: %s", error)
        return None


def _build(dtype: torch.dtype) -> Path:
    """The library's path. Raises `OSError` or `SubprocessError`."""
    flags = [*_FLAGS.split(), f"-DBFLOAT16={int(dtype == torch.bfloat16)}", "-fopenmp"]
    return build_library(_SOURCE, flags, ["-lm", _torch_openmp() or "-fopenmp"])


def _torch_openmp() -> str | None:
    """torch's own OpenMP library: a second one beside it would bring a second pool of threads."""
    folder = Path(torch.__file__).parent
    for pattern in ("torch/lib/libgomp*.so*", "torch.libs/libgomp*.so*"):
        for path in sorted(folder.parent.glob(pattern)):
            return str(path)
    return None
