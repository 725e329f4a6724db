"""Models of the Llama kind (Llama, Mistral, Mixtral, Qwen2, Qwen3) in few calls, on the native kernels.

A step of a layer is four or five products; transformers' modules surround them with some sixty small operators,
which cost as much as the products when few tokens are live.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from common.model.attention import current_pass
from common.model.linear import make_linear
from common.model.native import LANES, Kernels

_WINDOWED = ("mistral", "mixtral")


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
    """A decoder layer. The sum of a layer's input and output is left to the next norm, which does it on its way."""

    def __init__(self, layer: Any, kernels: Kernels) -> None:
        super().__init__()
        attention = layer.self_attn
        self._kernels = kernels
        self._layer: int = attention.layer_idx
        self._head_dim: int = attention.head_dim
        self._num_heads: int = attention.q_proj.out_features // attention.head_dim
        self._scale: float = attention.scaling
        self._window: int | None = _window(attention)
        self._epsilon: float = layer.input_layernorm.variance_epsilon
        self._input_norm: Tensor = layer.input_layernorm.weight
        self._mlp_norm: Tensor = layer.post_attention_layernorm.weight
        self._head_norms: tuple[Tensor, Tensor] | None = None
        if hasattr(attention, "q_norm"):
            self._head_norms = attention.q_norm.weight, attention.k_norm.weight
        self.query_key_value = make_linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = make_linear(attention.o_proj)
        self.mlp = GatedMlp(layer.mlp, kernels) if hasattr(layer.mlp, "gate_proj") else layer.mlp

    def forward(self, hidden: Tensor, added: Tensor | None, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        """hidden + added [rows, size] is the layer's input, and the sum of what it returns its output."""
        hidden, normed = self._add_norm(hidden, added, self._input_norm)
        fused = self.query_key_value(normed).view(hidden.shape[0], -1, self._head_dim)
        attention = current_pass.get()
        pool = attention.layer(self._layer)
        self._kernels.rotate_and_store_(fused, cosine, sine, self._head_norms, self._epsilon, pool, attention.slots)
        query = fused.narrow(1, 0, self._num_heads)
        attended = attention.attend_stored(self._layer, query, self._scale, self._window)
        hidden, normed = self._add_norm(hidden, self.output(attended.flatten(1)), self._mlp_norm)
        return hidden, self.mlp(normed[None])[0]

    def _add_norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        if added is None:
            return hidden, self._kernels.norm(hidden, weight, self._epsilon)
        return self._kernels.add_norm(hidden, added, weight, self._epsilon)


def _window(attention: Any) -> int | None:
    """The window as transformers' layer has it: its own where it differs by layer, else the model's in families that
    have one. (Some Llama files carry one, too, which means nothing there.)"""
    if hasattr(attention, "sliding_window"):
        own: int | None = attention.sliding_window
        return own
    return attention.config.sliding_window if attention.config.model_type in _WINDOWED else None


class FusedModel(nn.Module):
    """Takes over a base model whose layers are of this kind. On stages that lack embedding or last norm these pass
    their input on."""

    def __init__(self, base: Any, kernels: Kernels) -> None:
        super().__init__()
        self.embed_tokens = base.embed_tokens
        self.rotary = base.rotary_emb
        for index, layer in enumerate(base.layers):
            base.layers[index] = FusedLayer(layer, kernels)  # one by one: the old layer's memory is free again
        self.layers = base.layers
        self.norm = base.norm

    def forward(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """inputs [rows] ids or [rows, hidden]; positions [rows] -> [rows, hidden]."""
        hidden: Tensor = self.embed_tokens(inputs).contiguous()
        cosine, sine = self.rotary(hidden, positions[None])
        added: Tensor | None = None
        for layer in self.layers:
            hidden, added = layer(hidden, added, cosine, sine)
        output: Tensor = self.norm(hidden if added is None else hidden + added)
        return output


def is_fusible(config: Any) -> bool:
    """Whether the sizes of a model of this kind fit the kernels."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # half a head is rotated at a time
    sizes = (config.hidden_size, config.intermediate_size, head_dim // 2)
    return config.hidden_act == "silu" and not any(size % LANES for size in sizes)
