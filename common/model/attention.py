"""Attention over a paged KV pool, for packed batches of sequences of any length.

New keys and values are written into the pool first; then every sequence attends to its own blocks, which are read in
place where that is possible. Nothing is padded on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from common.model.batch import StageBatch
from common.model.native import Kernels
from common.model.plan import Padded, Planner, Span, TokenTable

ATTENTION_NAME = "dejavu_paged"
MAX_GATHERED_BYTES = 1 << 30
"""Of KV that is copied at a time. Many sequences, each filled up to the longest, may be many times the pool."""


class PagedPool(Protocol):
    """`layer(i)` gives keys and values, each [num_blocks, block_size, num_kv_heads, head_dim]."""

    @property
    def block_size(self) -> int: ...

    def layer(self, local_layer: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a batch reads in layers of one window. Single tokens have a `table` for the kernels, or are `padded`
    batches, or are attended to one by one."""

    prompts: Sequence[Span]
    tokens: Sequence[Span] = ()
    padded: Sequence[Padded] = ()
    table: TokenTable | None = None


class AttentionPass:
    """Attention of one batch. `on_layer(local_layer)` hears when the layer's new KV is in the pool. `slopes` [heads]
    turns ALiBi on. Single tokens go to `kernels` if given; else `is_gathering` copies their blocks to compute them as
    padded batches, which is what GPUs like."""

    def __init__(
        self,
        batch: StageBatch,
        pool: PagedPool,
        *,
        kernels: Kernels | None = None,
        is_gathering: bool = False,
        slopes: Tensor | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        self._pool = pool
        self._kernels = kernels
        self._is_gathering = is_gathering
        self._slopes = slopes
        self._on_layer = on_layer
        keys = pool.layer(0)[0]
        self._planner = Planner(batch.chunks, pool.block_size, keys.device, keys.dtype, slopes)
        self._plans: dict[int | None, _Plan] = {}
        self._has_tokens = any(chunk.num_tokens == 1 for chunk in batch.chunks)
        self.slots = self._planner.slots()
        """Where the batch's new KV goes: [rows], into a layer's [slots, kv_heads, dim]."""

    def layer(self, local_layer: int) -> tuple[Tensor, Tensor]:
        """The pool's keys and values of a layer."""
        return self._pool.layer(local_layer)

    def attend(
        self, local_layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """query [rows, heads, dim], key and value [rows, kv_heads, dim] -> [rows, heads, dim]. A row looks at itself
        and what precedes it, `window` rows in all if given."""
        keys, values = self._pool.layer(local_layer)
        keys.flatten(0, 1).index_copy_(0, self.slots, key)
        values.flatten(0, 1).index_copy_(0, self.slots, value)
        return self.attend_stored(local_layer, query, scale, window)

    def attend_stored(self, local_layer: int, query: Tensor, scale: float, window: int | None = None) -> Tensor:
        """The same for keys and values that are in the pool already."""
        if self._on_layer is not None:
            self._on_layer(local_layer)
        plan = self._plans.get(window) or self._make_plan(window)
        pool = self._pool.layer(local_layer)
        output = query.new_empty(query.shape)
        if plan.table is not None and self._kernels is not None:
            self._kernels.attend_tokens_(query, output, pool, plan.table, scale, self._slopes)
        keys, values = (part.flatten(0, 1) for part in pool)
        for padded in plan.padded:
            _attend_padded(padded, query, output, keys, values, scale)
        for span in plan.tokens:
            _attend_token(span, query, output, keys, values, scale)
        for span in plan.prompts:
            _attend_prompt(span, query, output, keys, values, scale)
        return output

    def _make_plan(self, window: int | None) -> _Plan:
        prompts = self._planner.prompts(window)
        if not self._has_tokens:
            plan = _Plan(prompts)
        elif self._kernels is not None:
            plan = _Plan(prompts, table=self._planner.token_table(window))
        elif self._is_gathering:
            plan = _Plan(prompts, padded=self._planner.padded(window, self._max_slots()))
        else:
            plan = _Plan(prompts, self._planner.tokens(window))
        self._plans[window] = plan
        return plan

    def _max_slots(self) -> int:
        """How many slots' keys and values may be copied at a time."""
        keys = self._pool.layer(0)[0]
        return MAX_GATHERED_BYTES // (2 * keys[0, 0].numel() * keys.element_size())


def _attend_token(span: Span, query: Tensor, output: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
    """One row. The heads that share a KV head become the rows of one product."""
    num_kv_heads = keys.shape[1]
    grouped = _grouped(query[span.first_row, None], num_kv_heads)
    bias = span.bias
    if bias is not None:
        bias = bias.view(1, num_kv_heads, -1, span.num_slots)
    attended = scaled_dot_product_attention(
        grouped, span.read(keys)[None], span.read(values)[None], attn_mask=bias, scale=scale
    )
    output[span.first_row] = attended.view(query.shape[1:])


def _attend_padded(padded: Padded, query: Tensor, output: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
    """A batch of single tokens at once, grouped likewise."""
    num_kv_heads = keys.shape[1]
    grouped = _grouped(query[padded.rows], num_kv_heads)
    bias = padded.bias
    if bias.shape[1] > 1:
        bias = bias.view(len(padded.rows), num_kv_heads, -1, bias.shape[3])
    attended = scaled_dot_product_attention(
        grouped,
        keys[padded.index].transpose(1, 2),
        values[padded.index].transpose(1, 2),
        attn_mask=bias,
        scale=scale,
    )
    output[padded.rows] = attended.flatten(1, 2)


def _attend_prompt(span: Span, query: Tensor, output: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
    """A prompt chunk. KV heads take the place of the batch, so that the heads of a group share one without a copy."""
    rows = slice(span.first_row, span.end_row)
    num_kv_heads = keys.shape[1]
    grouped = _grouped(query[rows], num_kv_heads).permute(1, 2, 0, 3)
    group = grouped.shape[1]
    bias = span.bias
    if bias is not None and bias.dim() == 3:
        bias = bias.view(num_kv_heads, group, *bias.shape[1:])
    attended = scaled_dot_product_attention(
        grouped,
        span.read(keys)[:, None].expand(-1, group, -1, -1),
        span.read(values)[:, None].expand(-1, group, -1, -1),
        attn_mask=bias,
        is_causal=bias is None,
        scale=scale,
    )
    output[rows] = attended.permute(2, 0, 1, 3).flatten(1, 2)


def _grouped(query: Tensor, num_kv_heads: int) -> Tensor:
    """[rows, heads, dim] -> [rows, kv_heads, group, dim]"""
    num_rows, num_heads, head_dim = query.shape
    return query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)


current_pass: ContextVar[AttentionPass] = ContextVar("current_pass")
"""The pass that layers attend through: not every module of transformers hands options down to its attention."""


def paged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """What transformers' layers call: one packed row, [1, heads, rows, dim] -> [1, rows, heads, dim]."""
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    window = options.get("sliding_window")
    output = current_pass.get().attend(module.layer_idx, query, key, value, scaling, window)
    return output[None], None
