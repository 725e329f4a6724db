"""Attention over a paged KV pool, for packed batches of sequences of any length.

New keys and values are written into the pool first; then every sequence attends to its own blocks. Where its blocks
are one ascending run (the allocator prefers that) the pool is read in place; several runs are joined for that
sequence alone. Nothing is padded. Planning is done once per batch, not once per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from common.model.batch import SequenceChunk, StageBatch

ATTENTION_NAME = "dejavu_paged"


class PagedPool(Protocol):
    """`layer(i)` gives keys and values, each [num_blocks, block_size, num_kv_heads, head_dim]."""

    @property
    def block_size(self) -> int: ...

    def layer(self, local_layer: int) -> tuple[Tensor, Tensor]: ...


@dataclass(slots=True)
class ChunkPlan:
    """Rows [first, end) of the packed batch attend to `length` slots: `runs` of (first slot, end slot)."""

    first: int
    end: int
    start: int
    length: int
    runs: list[tuple[int, int]]
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """[num_tokens, length]: True where a row may look; built once and shared by the layers."""
        found = self.masks.get(window)
        if found is None:
            rows = torch.arange(self.start, self.length, device=device)[:, None]
            columns = torch.arange(self.length, device=device)[None, :]
            found = columns <= rows
            if window is not None:
                found &= columns > rows - window
            self.masks[window] = found
        return found


class AttentionPass:
    """One batch's plan; `attend` is called by every layer. `on_layer(local_layer)` hears when its KV is in the pool."""

    def __init__(self, batch: StageBatch, pool: PagedPool, on_layer: Callable[[int], None] | None) -> None:
        self._pool = pool
        self._on_layer = on_layer
        self._plans: list[ChunkPlan] = []
        slots: list[int] = []
        row = 0
        for chunk in batch.chunks:
            plan = _plan_chunk(chunk, pool.block_size, row)
            self._plans.append(plan)
            slots += _slots(chunk, pool.block_size)
            row = plan.end
        device = pool.layer(0)[0].device
        self._slots = torch.tensor(slots, dtype=torch.long, device=device)

    def attend(
        self,
        local_layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        """query [heads, rows, dim], key and value [kv_heads, rows, dim] -> [rows, heads, dim]. `slopes` [heads] adds
        ALiBi, `window` bounds how far back a row looks (the row itself included)."""
        keys, values = self._pool.layer(local_layer)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        keys.index_copy_(0, self._slots, key.transpose(0, 1))
        values.index_copy_(0, self._slots, value.transpose(0, 1))
        if self._on_layer is not None:
            self._on_layer(local_layer)
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        for plan in self._plans:
            rows = query[:, plan.first : plan.end]
            reach = _within(plan, window)
            attend = _attend_token if plan.end - plan.first == 1 else _attend_prompt
            output[plan.first : plan.end] = attend(
                plan,
                rows,
                _gather(keys, plan.runs, reach),
                _gather(values, plan.runs, reach),
                scale,
                window,
                slopes,
            )
        return output


def _within(plan: ChunkPlan, window: int | None) -> int:
    """How many slots at the front a single row cannot see any more."""
    is_token = plan.end - plan.first == 1
    return max(0, plan.length - window) if is_token and window is not None else 0


def _gather(flat: Tensor, runs: Sequence[tuple[int, int]], skip: int) -> Tensor:
    """[kv_heads, length - skip, dim]; a view of the pool where the blocks are one run."""
    pieces = [flat[first:end] for first, end in runs]
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return joined[skip:].transpose(0, 1)


def _attend_token(
    plan: ChunkPlan, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None,
    slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """One row: the heads that share a KV head become the rows of one product."""
    num_kv_heads, length, head_dim = keys.shape
    grouped = query.reshape(1, num_kv_heads, -1, head_dim)
    bias = None
    if slopes is not None:
        distance = torch.arange(1 - length, 1, device=keys.device, dtype=slopes.dtype)
        bias = (slopes[:, None] * distance).reshape(1, num_kv_heads, -1, length).to(query.dtype)
    output = scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=bias, scale=scale)
    return output.reshape(1, -1, head_dim)


def _attend_prompt(
    plan: ChunkPlan, query: Tensor, keys: Tensor, values: Tensor, scale: float | None, window: int | None,
    slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """A prompt chunk of one sequence."""
    group = query.shape[0] // keys.shape[0]
    if group > 1:
        keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    is_plain = plan.start == 0 and slopes is None and (window is None or plan.length <= window)
    mask: Tensor | None = None
    if not is_plain:
        mask = plan.mask(window if window is not None and plan.length > window else None, keys.device)
        if slopes is not None:
            mask = _alibi_mask(plan, mask, slopes).to(query.dtype)
    output = scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=is_plain, scale=scale
    )
    return output[0].transpose(0, 1)


def _alibi_mask(plan: ChunkPlan, mask: Tensor, slopes: Tensor) -> Tensor:
    rows = torch.arange(plan.start, plan.length, device=mask.device)[:, None]
    distance = torch.arange(plan.length, device=mask.device)[None, :] - rows
    return (slopes[:, None, None] * distance).masked_fill(~mask, float("-inf"))[None]


def _plan_chunk(chunk: SequenceChunk, block_size: int, row: int) -> ChunkPlan:
    length = chunk.start + chunk.num_tokens
    runs: list[tuple[int, int]] = []
    left = length
    for block in chunk.blocks:
        first, size = block * block_size, min(block_size, left)
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], first + size)
        else:
            runs.append((first, first + size))
        left -= size
        if left == 0:
            break
    return ChunkPlan(row, row + chunk.num_tokens, chunk.start, length, runs)


def _slots(chunk: SequenceChunk, block_size: int) -> list[int]:
    positions = range(chunk.start, chunk.start + chunk.num_tokens)
    return [chunk.blocks[p // block_size] * block_size + p % block_size for p in positions]


current_pass: ContextVar[AttentionPass] = ContextVar("current_pass")


def paged_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What transformers' layers call: one packed row, [1, heads, rows, dim] -> [1, rows, heads, dim]."""
    output = current_pass.get().attend(
        module.layer_idx, query[0], key[0], value[0], scaling, options.get("sliding_window")
    )
    return output[None], None
