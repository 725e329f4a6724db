"""Fewer bits for KV on the wire: int8 or fp8 (e4m3) with a float32 scale per token and head. Pure; what it gives
does not depend on the element type of either pool."""

from __future__ import annotations

import torch

WIRE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def quantise(values: torch.Tensor, wire: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., head_dim] and scales [..., 1] of values [..., head_dim]. Raises `ValueError` for an unknown
    `wire`, and for values that are not finite: they have no scale."""
    if wire not in WIRE_DTYPES:
        raise ValueError(f"precision {wire!r} is not one of {', '.join(WIRE_DTYPES)}")
    exact = values.to(torch.float32)
    scales = exact.abs().amax(dim=-1, keepdim=True) / _LARGEST[wire]
    if not bool(scales.isfinite().all()):
        raise ValueError("values that are not finite cannot be quantised")
    # a head of zeros, or of numbers too small to divide by
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (exact / scales).clamp(-_LARGEST[wire], _LARGEST[wire])
    codes = scaled.round() if wire == "int8" else scaled
    return codes.to(WIRE_DTYPES[wire]), scales


def restore(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values [..., head_dim] as `dtype`, off by at most what `max_error` says, and `dtype`'s rounding."""
    return (codes.to(torch.float32) * scales).to(dtype)


def max_error(values: torch.Tensor, wire: str) -> torch.Tensor:
    """Bound of the error of each head [..., 1]: half the largest step between two codes."""
    largest = values.to(torch.float32).abs().amax(dim=-1, keepdim=True)
    return largest * (0.5 / 127 if wire == "int8" else 2.0**-4) * (1 + 1e-5) + 1e-37
