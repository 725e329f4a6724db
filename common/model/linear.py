"""Linear layers with weights packed once for oneDNN: two to three times faster than plain ones for a few rows.

The operators are those that torch's own compiled graphs use. They are private, so they are probed once; where they
are missing or fail the plain layers stay.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PACKED_ROWS = 32
"""rows the packing is tuned for; other row counts work, too"""
MIN_PACKED_ELEMENTS = 1 << 16


class PackedLinear(nn.Module):
    """y = x W^T + b for [.., in] inputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
        self._bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        output: Tensor = torch.ops.mkldnn._linear_pointwise(flat, self._weight, self._bias, "none", [], "")
        return output.view(*inputs.shape[:-1], self.out_features)


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


def pack_linears(module: nn.Module) -> None:
    """Replaces the linear layers (GPT-2's transposed ones too) below `module`, in place."""
    for name, child in module.named_children():
        linear = _as_linear(child)
        if linear is None:
            pack_linears(child)
        elif linear[0].numel() >= MIN_PACKED_ELEMENTS and _can_pack(linear[0].dtype):
            setattr(module, name, PackedLinear(*linear))


def _as_linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """(weight [out, in], bias) of a linear layer."""
    if type(module) is nn.Linear:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    if isinstance(module, Conv1D):
        return module.weight.detach().t().contiguous(), module.bias.detach()
    return None
