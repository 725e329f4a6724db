"""Where the rows of a batch find their keys and values in the paged pool. Worked out once per batch, not per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.model.batch import SequenceChunk

_MASK_WIDTH = 16


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [first_row, end_row) of the batch, one chunk, look at `num_slots` slots of the pool: those from `first_slot`
    on, or those of `index` where the blocks are not one ascending run. `bias` ([rows, slots] or [heads, rows, slots])
    is added to the scores; without one, several rows look at the slots causally."""

    first_row: int
    end_row: int
    num_slots: int
    first_slot: int
    index: Tensor | None
    bias: Tensor | None

    def read(self, flat: Tensor) -> Tensor:
        """flat [slots of the pool, kv_heads, dim] -> [kv_heads, num_slots, dim], in place if possible."""
        if self.index is not None:
            return flat.index_select(0, self.index).transpose(0, 1)
        return flat.narrow(0, self.first_slot, self.num_slots).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Single tokens of a batch. Token i is row rows[i] (int64) and looks at positions [starts[i], lengths[i]) of the
    block table that begins at blocks[tables[i]] (all int32)."""

    rows: Tensor
    tables: Tensor
    starts: Tensor
    lengths: Tensor
    blocks: Tensor


@dataclass(frozen=True, slots=True)
class Padded:
    """Single tokens that are computed as one batch: their `rows`, slots `index` [tokens, longest] and `bias` [tokens,
    1 or heads, 1, longest]."""

    rows: Tensor
    index: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans for chunks over a pool of `block_size` on `device`. `slopes` [heads] where attention is biased by distance;
    biases have the pool's `dtype`."""

    chunks: Sequence[SequenceChunk]
    block_size: int
    device: torch.device
    dtype: torch.dtype
    slopes: Tensor | None

    def slots(self) -> Tensor:
        """Where the new KV goes: [rows], into a layer's [slots, kv_heads, dim]."""
        slots = [
            chunk.blocks[position // self.block_size] * self.block_size + position % self.block_size
            for chunk in self.chunks
            for position in range(chunk.start, chunk.start + chunk.num_tokens)
        ]
        return torch.tensor(slots, dtype=torch.long, device=self.device)

    def prompts(self, window: int | None) -> list[Span]:
        """The chunks of several tokens."""
        return [self._span(row, chunk, window) for row, chunk in self._numbered() if chunk.num_tokens > 1]

    def tokens(self, window: int | None) -> list[Span]:
        """The chunks of one token."""
        return [self._span(row, chunk, window) for row, chunk in self._numbered() if chunk.num_tokens == 1]

    def token_table(self, window: int | None) -> TokenTable:
        """The chunks of one token, as the kernels want them."""
        rows: list[int] = []
        tables: list[int] = []
        starts: list[int] = []
        lengths: list[int] = []
        blocks: list[int] = []
        for row, chunk in self._numbered():
            if chunk.num_tokens == 1:
                rows.append(row)
                tables.append(len(blocks))
                starts.append(_num_unseen(chunk, window))
                lengths.append(chunk.start + 1)
                blocks += chunk.blocks
        return TokenTable(
            torch.tensor(rows, dtype=torch.long),
            *(torch.tensor(values, dtype=torch.int32) for values in (tables, starts, lengths, blocks)),
        )

    def padded(self, window: int | None, max_slots: int) -> list[Padded]:
        """The chunks of one token in batches of at most `max_slots` slots, or of one token that has more."""
        tokens = [(row, chunk) for row, chunk in self._numbered() if chunk.num_tokens == 1]
        widths = [_mask_width(chunk.start + 1 - _num_unseen(chunk, window)) for _, chunk in tokens]
        return [self._pad([tokens[place] for place in group], window) for group in _groups(widths, max_slots)]

    def _pad(self, tokens: Sequence[tuple[int, SequenceChunk]], window: int | None) -> Padded:
        """Filled up to the longest. Made on the host: a GPU waits for it only once."""
        unseen = np.array([_num_unseen(chunk, window) for _, chunk in tokens])
        num_slots = np.array([chunk.start + 1 for _, chunk in tokens]) - unseen
        columns = np.arange(_mask_width(num_slots.max()))
        index = np.empty((len(tokens), len(columns)), dtype=np.int64)
        for place, first, count, (_, chunk) in zip(index, unseen, num_slots, tokens, strict=True):
            positions = columns[:count] + first
            table = np.asarray(chunk.blocks, dtype=np.int64)
            place[:count] = table[positions // self.block_size] * self.block_size + positions % self.block_size
            # no weight makes anything of a number that is none: better the own one's than that of another sequence
            place[count:] = place[count - 1]
        lengths = self._on_device(num_slots)[:, None]
        is_hidden = torch.arange(len(columns), device=self.device) >= lengths
        if self.slopes is None:
            bias = torch.zeros(is_hidden.shape, device=self.device)[:, None]
        else:
            distances = torch.arange(len(columns), device=self.device) - (lengths - 1)
            bias = self.slopes[:, None] * distances[:, None]
        bias = bias.masked_fill_(is_hidden[:, None], float("-inf")).to(self.dtype)
        rows = np.array([row for row, _ in tokens])
        return Padded(self._on_device(rows), self._on_device(index), bias[:, :, None])

    def _on_device(self, numbers: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)

    def _numbered(self) -> list[tuple[int, SequenceChunk]]:
        """Each chunk with its first row."""
        numbered, row = [], 0
        for chunk in self.chunks:
            numbered.append((row, chunk))
            row += chunk.num_tokens
        return numbered

    def _span(self, row: int, chunk: SequenceChunk, window: int | None) -> Span:
        length = chunk.start + chunk.num_tokens
        unseen = _num_unseen(chunk, window)
        blocks = list(chunk.blocks[: -(-length // self.block_size)])
        index = None
        if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
            table = torch.tensor(blocks, device=self.device) * self.block_size
            index = (table[:, None] + torch.arange(self.block_size, device=self.device)).flatten()[unseen:length]
        first_slot = blocks[0] * self.block_size + unseen
        bias = self._bias(chunk, unseen, window)
        return Span(row, row + chunk.num_tokens, length - unseen, first_slot, index, bias)

    def _bias(self, chunk: SequenceChunk, unseen: int, window: int | None) -> Tensor | None:
        length = chunk.start + chunk.num_tokens
        is_cut = window is not None and length > window
        # a mask that torch knows by itself: of one row all is seen, and from position 0 on its causal mask fits
        is_simple = chunk.num_tokens == 1 or (chunk.start == 0 and not is_cut)
        if is_simple and self.slopes is None:
            return None
        rows = torch.arange(chunk.start, length, device=self.device)[:, None]
        columns = torch.arange(unseen, length, device=self.device)[None, :]
        is_hidden = columns > rows
        if window is not None:
            is_hidden |= columns <= rows - window
        if self.slopes is None:
            bias = torch.zeros(is_hidden.shape, device=self.device)
        else:
            bias = self.slopes[:, None, None] * (columns - rows)
        return bias.masked_fill_(is_hidden, float("-inf")).to(self.dtype)


def _groups(widths: Sequence[int], max_slots: int) -> list[list[int]]:
    """Places of `widths` in groups which, filled up to their widest, have at most `max_slots`, or one member."""
    if len(widths) * max(widths) <= max_slots:
        return [list(range(len(widths)))]
    groups: list[list[int]] = []
    for place in sorted(range(len(widths)), key=widths.__getitem__, reverse=True):
        if groups and widths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_slots:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _mask_width(num_slots: int) -> int:
    """A mask of another width would be copied to such a one in every layer."""
    return -(-num_slots // _MASK_WIDTH) * _MASK_WIDTH


def _num_unseen(chunk: SequenceChunk, window: int | None) -> int:
    """Positions that even the chunk's first row cannot see any more."""
    return 0 if window is None else max(0, chunk.start + 1 - window)
