"""Decoder layers of the Llama kind (Llama, Mistral, Mixtral, Qwen2, Qwen3) in few calls, on the native kernels.

A step of such a layer is four or five products; transformers' modules surround them with some sixty small operators,
which cost as much as the products when few tokens are live.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from common.model.attention import current_pass
from common.model.linear import make_linear
from common.model.native import LANES, Kernels


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, mlp: Any, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels
        self.gate = make_linear(mlp.gate_proj)
        self.up = make_linear(mlp.up_proj)
        self.down = make_linear(mlp.down_proj)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.down(self._kernels.gated_silu_(self.gate(inputs), self.up(inputs)))
        return output


class FusedLayer(nn.Module):
    """Takes the place of a decoder layer: [1, rows, hidden] -> the same."""

    def __init__(self, layer: Any, kernels: Kernels) -> None:
        super().__init__()
        attention = layer.self_attn
        self._kernels = kernels
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.num_heads: int = attention.q_proj.out_features // attention.head_dim
        self.scaling: float = attention.scaling
        self.window: int | None = getattr(
            attention, "sliding_window", getattr(attention.config, "sliding_window", None)
        )
        self.input_norm = layer.input_layernorm
        self.mlp_norm = layer.post_attention_layernorm
        self.head_norms: tuple[Tensor, Tensor] | None = None
        if hasattr(attention, "q_norm"):
            self.head_norms = attention.q_norm.weight, attention.k_norm.weight
        self.query_key_value = make_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = make_linear(attention.o_proj)
        self.mlp = GatedMlp(layer.mlp, kernels) if hasattr(layer.mlp, "gate_proj") else layer.mlp

    def forward(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        hidden = hidden_states[0]
        epsilon = self.input_norm.variance_epsilon
        normed = self._kernels.norm(hidden, self.input_norm.weight, epsilon)
        fused = self.query_key_value(normed).view(hidden.shape[0], -1, self.head_dim)
        attention = current_pass.get()
        pool = attention.layer(self.layer_idx)
        cosine, sine = position_embeddings
        self._kernels.rotate_and_store_(fused, cosine[0], sine[0], self.head_norms, epsilon, pool, attention.slots)
        query = fused[:, : self.num_heads]
        attended = attention.attend_stored(self.layer_idx, query, self.scaling, self.window)
        total, normed = self._kernels.add_norm(hidden, self.output(attended.flatten(1)), self.mlp_norm.weight, epsilon)
        output: Tensor = total[None].add_(self.mlp(normed[None]))
        return output


def fuse_layers(base: Any, kernels: Kernels) -> None:
    """Replaces the layers of a base model of this kind, in place, where their sizes fit the kernels."""
    config = base.config
    sizes = (config.hidden_size, config.intermediate_size, base.layers[0].self_attn.head_dim // 2)
    if config.hidden_act == "silu" and not any(size % LANES for size in sizes):
        for index, layer in enumerate(base.layers):
            base.layers[index] = FusedLayer(layer, kernels)
