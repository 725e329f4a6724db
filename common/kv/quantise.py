"""KV as other elements; among them int8 and fp8 (e4m3) with a float32 scale per token and head, which halve or
quarter what travels and what a store keeps. Pure; what it gives does not depend on the element type of either pool."""

from __future__ import annotations

import torch

from common.kv.layout import QUANTISED, SCALE_BYTES

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


def convert(heads: torch.Tensor, dtype: str, to: str) -> torch.Tensor:
    """Bytes uint8 [heads x bytes of a head] of a packed buffer, from elements of `dtype` to elements of `to`, rounded
    to nearest. Raises `ValueError` as `quantise` does."""
    if dtype == to:
        return heads
    values = _unpacked(heads, dtype)
    if to not in QUANTISED:
        return values.to(getattr(torch, to)).view(torch.uint8)
    codes, scales = quantise(values, to)
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=1)


def _unpacked(heads: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype not in QUANTISED:
        values: torch.Tensor = heads.view(getattr(torch, dtype))
        return values
    codes, scales = heads[:, :-SCALE_BYTES].contiguous(), heads[:, -SCALE_BYTES:].contiguous()
    return restore(codes.view(WIRE_DTYPES[dtype]), scales.view(torch.float32), torch.float32)
