"""Attention over a paged KV pool, for packed batches of sequences of any length.

New keys and values are written into the pool first; then every sequence attends to its own blocks. Where
these are one ascending run (the allocator prefers that) the pool is read in place. All planning is done once per
batch, not per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from common.model.batch import SequenceChunk, StageBatch

ATTENTION_NAME = "dejavu_paged"


class PagedPool(Protocol):
    """`layer(i)` gives keys and values, each [num_blocks, block_size, num_kv_heads, head_dim]."""

    @property
    def block_size(self) -> int: ...

    def layer(self, local_layer: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [first_row, end_row) of the batch look at `num_slots` slots of the pool: those from `first_slot` on, or
    those of `index`. `bias` ([rows, slots] or [heads, rows, slots]) is added to the scores; without one, several rows
    look at the slots causally."""

    first_row: int
    end_row: int
    num_slots: int
    first_slot: int
    index: Tensor | None
    bias: Tensor | None

    def read(self, flat: Tensor) -> Tensor:
        """flat [kv_heads, slots of the pool, dim] -> [kv_heads, num_slots, dim], in place if possible."""
        if self.index is not None:
            return flat.index_select(1, self.index)
        return flat.narrow(1, self.first_slot, self.num_slots)


@dataclass(slots=True)
class Plan:
    """The spans of a batch for layers with one window: single tokens apart from prompt chunks."""

    tokens: list[Span]
    prompts: list[Span]
    gathered: tuple[Tensor, Tensor] | None = None
    """Slots [tokens, longest] and bias [tokens, 1 or heads, 1, longest] of all tokens at once."""


class AttentionPass:
    """Attention of one batch. `attend` is called by every layer; `on_layer(local_layer)` hears when the layer's new KV
    is in the pool. `slopes` [heads] turns ALiBi on. `is_gathering`: single tokens are computed as one padded batch over
    copies of their blocks (what GPUs like) instead of one by one in place."""

    def __init__(
        self,
        batch: StageBatch,
        pool: PagedPool,
        *,
        slopes: Tensor | None = None,
        on_layer: Callable[[int], None] | None = None,
        is_gathering: bool | None = None,
    ) -> None:
        self._pool = pool
        self._chunks = batch.chunks
        self._on_layer = on_layer
        self._slopes = slopes
        first_keys = pool.layer(0)[0]
        self._device, self._dtype = first_keys.device, first_keys.dtype
        self._is_gathering = self._device.type != "cpu" if is_gathering is None else is_gathering
        self._slots = _slots(batch.chunks, pool.block_size, self._device)
        self._token_rows = _token_rows(batch.chunks, self._device)
        self._plans: dict[int | None, Plan] = {}

    def attend(
        self, local_layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None,
        window: int | None = None,
    ) -> Tensor:  # fmt: skip
        """query [rows, heads, dim], key and value [rows, kv_heads, dim] -> [rows, heads, dim]. A row looks at
        itself and what precedes it, `window` rows in all if given."""
        keys, values = (part.flatten(0, 1) for part in self._pool.layer(local_layer))
        _write(keys, self._slots, key)
        _write(values, self._slots, value)
        if self._on_layer is not None:
            self._on_layer(local_layer)
        plan = self._plan(window)
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)
        if not plan.prompts:
            return self._attend_tokens(plan, query, keys, values, scale)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        if plan.tokens:
            tokens = self._attend_tokens(plan, query[self._token_rows], keys, values, scale)
            output.index_copy_(0, self._token_rows, tokens)
        for span in plan.prompts:
            rows = slice(span.first_row, span.end_row)
            output[rows] = _attend_prompt(span, query[rows], keys, values, scale)
        return output

    def _plan(self, window: int | None) -> Plan:
        plan = self._plans.get(window)
        if plan is None:
            spans = self._spans(window)
            plan = Plan(
                tokens=[span for span in spans if span.end_row - span.first_row == 1],
                prompts=[span for span in spans if span.end_row - span.first_row > 1],
            )
            if plan.tokens and self._is_gathering:
                plan.gathered = _gather_plan(plan.tokens, self._dtype, self._device)
            self._plans[window] = plan
        return plan

    def _spans(self, window: int | None) -> list[Span]:
        spans: list[Span] = []
        row = 0
        for chunk in self._chunks:
            end_row = row + chunk.num_tokens
            length = chunk.start + chunk.num_tokens
            # what even the chunk's first row cannot see any more is left out
            skipped = 0 if window is None else max(0, chunk.start + 1 - window)
            blocks = chunk.blocks[: -(-length // self._pool.block_size)]
            index = None
            if not _is_run(blocks):
                index = _slot_table(blocks, self._pool.block_size, self._device)[skipped:length]
            first_slot = blocks[0] * self._pool.block_size + skipped
            bias = self._bias(chunk, skipped, window)
            spans.append(Span(row, end_row, length - skipped, first_slot, index, bias))
            row = end_row
        return spans

    def _bias(self, chunk: SequenceChunk, skipped: int, window: int | None) -> Tensor | None:
        length = chunk.start + chunk.num_tokens
        is_cut = window is not None and length - skipped > window
        is_causal = chunk.num_tokens == 1 or (chunk.start == 0 and not is_cut)
        if is_causal and self._slopes is None:
            return None
        rows = torch.arange(chunk.start, length, device=self._device)[:, None]
        columns = torch.arange(skipped, length, device=self._device)[None, :]
        is_hidden = columns > rows
        if window is not None:
            is_hidden |= columns <= rows - window
        if self._slopes is None:
            bias = torch.zeros(is_hidden.shape, device=self._device)
        else:
            bias = self._slopes[:, None, None] * (columns - rows)
        return bias.masked_fill_(is_hidden, float("-inf")).to(self._dtype)

    def _attend_tokens(self, plan: Plan, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """query [tokens, heads, dim]. The heads that share a KV head become the rows of one product."""
        num_kv_heads = keys.shape[0]
        grouped = query.reshape(query.shape[0], num_kv_heads, -1, query.shape[2])
        if plan.gathered is None:
            pieces = [
                _attend_token(span, rows, keys, values, scale)
                for span, rows in zip(plan.tokens, torch.split(grouped, 1), strict=True)
            ]
            return torch.cat(pieces).view(query.shape)
        index, bias = plan.gathered
        if bias.shape[1] > 1:
            bias = bias.view(len(plan.tokens), num_kv_heads, -1, index.shape[1])
        output = scaled_dot_product_attention(
            grouped,
            keys[:, index].transpose(0, 1),
            values[:, index].transpose(0, 1),
            attn_mask=bias,
            scale=scale,
        )
        return output.reshape(query.shape)


def _attend_token(span: Span, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """query [1, kv_heads, group, dim] -> the same."""
    bias = span.bias
    if bias is not None:
        bias = bias.view(1, query.shape[1], query.shape[2], span.num_slots)
    return scaled_dot_product_attention(
        query, span.read(keys)[None], span.read(values)[None], attn_mask=bias, scale=scale
    )


def _attend_prompt(span: Span, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
    """A prompt chunk of one sequence: query [rows, heads, dim] -> the same. KV heads take the place of the batch, so
    that the heads of a group can share one without copying it."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    shared = (num_kv_heads, group, span.num_slots, head_dim)
    bias = span.bias
    if bias is not None and bias.dim() == 3:
        bias = bias.view(num_kv_heads, group, num_rows, span.num_slots)
    output = scaled_dot_product_attention(
        query.view(num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3),
        span.read(keys)[:, None].expand(shared),
        span.read(values)[:, None].expand(shared),
        attn_mask=bias,
        is_causal=bias is None,
        scale=scale,
    )
    return output.permute(2, 0, 1, 3).reshape(query.shape)


def _gather_plan(tokens: Sequence[Span], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(span.num_slots for span in tokens)
    indices: list[Tensor] = []
    biases: list[Tensor] = []
    for span in tokens:
        missing = longest - span.num_slots
        index = span.index
        if index is None:
            index = torch.arange(span.first_slot, span.first_slot + span.num_slots, device=device)
        bias = span.bias
        if bias is None:
            bias = torch.zeros(1, 1, span.num_slots, dtype=dtype, device=device)
        indices.append(pad(index, (0, missing)))
        biases.append(pad(bias, (0, missing), value=float("-inf")))
    return torch.stack(indices), torch.stack(biases)


def _is_run(blocks: Sequence[int]) -> bool:
    return list(blocks) == list(range(blocks[0], blocks[0] + len(blocks)))


def _slot_table(blocks: Sequence[int], block_size: int, device: torch.device) -> Tensor:
    first_slots = torch.tensor(blocks, dtype=torch.long, device=device) * block_size
    return (first_slots[:, None] + torch.arange(block_size, device=device)).flatten()


def _slots(chunks: Sequence[SequenceChunk], block_size: int, device: torch.device) -> slice | Tensor:
    """Where the batch's new KV goes: a slice where the slots are one run."""
    slots = [
        chunk.blocks[position // block_size] * block_size + position % block_size
        for chunk in chunks
        for position in range(chunk.start, chunk.start + chunk.num_tokens)
    ]
    if _is_run(slots):
        return slice(slots[0], slots[0] + len(slots))
    return torch.tensor(slots, dtype=torch.long, device=device)


def _token_rows(chunks: Sequence[SequenceChunk], device: torch.device) -> Tensor:
    """Rows of the batch that are chunks of one token."""
    rows: list[int] = []
    row = 0
    for chunk in chunks:
        if chunk.num_tokens == 1:
            rows.append(row)
        row += chunk.num_tokens
    return torch.tensor(rows, dtype=torch.long, device=device)


def _write(flat: Tensor, slots: slice | Tensor, rows: Tensor) -> None:
    if isinstance(slots, slice):
        flat[slots] = rows
    else:
        flat.index_copy_(0, slots, rows)


current_pass: ContextVar[AttentionPass] = ContextVar("current_pass")
"""The pass that layers attend through: transformers hands its attention functions no place for it."""


def paged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers' layers call: one packed row, [1, heads, rows, dim] -> [1, rows, heads, dim]."""
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    window = options.get("sliding_window")
    output = current_pass.get().attend(module.layer_idx, query, key, value, scaling, window)
    return output[None], None
