"""Linear layers with weights packed once for oneDNN: two to three times faster than plain ones for a few rows.

On a processor that computes in float32 only, 16-bit layers are kept in float32: each product would widen its operands
anyway, at several times the cost. Outputs are the same, rounded once; the weights take twice the memory.

The operators are those that torch's own compiled graphs use. They are private, so they are probed once; where they are
missing or fail the plain layers stay.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PACKED_ROWS = 32
"""Rows the packing is tuned for; other row counts work, too."""
MIN_PACKED_FLOAT32 = 1 << 18
"""Elements from which packing pays off in float32: a packed call costs 12 us more. In bfloat16 it always does."""


class PackedLinear(nn.Module):
    """y = x W^T + b for [.., in] inputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._linear = torch.ops.mkldnn._linear_pointwise.default
        self._dtype = weight.dtype
        inner = weight.dtype if computes_in(weight.dtype) else torch.float32
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(inner).contiguous(), PACKED_ROWS)
        self._bias = None if bias is None else bias.to(inner)
        self._inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self._linear(inputs.to(self._inner), self._weight, self._bias, "none", [], "")
        return output.to(self._dtype)


class PlainLinear(nn.Module):
    """The same with the weight as it is, [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight = weight
        self._bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self._weight, self._bias)


def make_linear(*layers: nn.Linear) -> PackedLinear | PlainLinear:
    """One layer for several that have the same input; their outputs follow one another."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    return PackedLinear(weight, bias) if _pays_off(weight) else PlainLinear(weight, bias)


def pack_linears(module: nn.Module) -> None:
    """Replaces the linear layers (GPT-2's transposed ones too) below `module`, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            weight, bias = child.weight.detach(), child.bias
        elif isinstance(child, Conv1D):
            weight, bias = child.weight.detach().t(), child.bias
        else:
            pack_linears(child)
            continue
        if _pays_off(weight):
            setattr(module, name, PackedLinear(weight, None if bias is None else bias.detach()))


@functools.cache
def computes_in(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of this type by itself, as far as torch can tell."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    match dtype:
        case torch.bfloat16:
            return any(_processor_has(feature) for feature in ("avx512_bf16", "amx_tile"))
        case torch.float16:
            return _processor_has("amx_fp16")
    return True


def _processor_has(feature: str) -> bool:
    ask = getattr(torch.cpu, f"_is_{feature}_supported", None)
    # a version of torch that cannot tell leaves it to its own layers
    return True if ask is None else bool(ask())


def _pays_off(weight: Tensor) -> bool:
    is_large = weight.dtype == torch.bfloat16 or weight.numel() >= MIN_PACKED_FLOAT32
    return is_large and _can_pack(weight.dtype)


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    weight = torch.randn(64, 32).to(dtype)
    inputs = torch.randn(3, 32).to(dtype)
    try:
        with torch.inference_mode():
            packed = PackedLinear(weight, None)(inputs)
            plain = nn.functional.linear(inputs, weight)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.allclose(packed.float(), plain.float(), rtol=1e-2, atol=1e-1)
