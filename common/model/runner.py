"""One forward pass over a stage's layers: prompt chunks and token steps of any sequences, in one packed row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.model.attention import AttentionPass, PagedPool, current_pass
from common.model.batch import StageBatch
from common.model.loader import StageModel


class StageRunner:
    """Runs a stage over its pool. Not thread-safe: one thread computes. `is_gathering` (default: not on CPUs): see
    `AttentionPass`; it matters only without kernels."""

    def __init__(self, model: StageModel, pool: PagedPool, *, is_gathering: bool | None = None) -> None:
        self.model = model
        self._pool = pool
        self._device = pool.layer(0)[0].device
        self._is_gathering = self._device.type != "cpu" if is_gathering is None else is_gathering

    @torch.inference_mode()
    def run(self, batch: StageBatch, hidden: Tensor | None, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Computes the batch and writes its KV into the pool.

        `hidden` [rows, hidden_size] comes from the previous stage (None on the first, which embeds `token_ids`).
        `on_layer(local_layer)` is told when the batch's KV of a layer is in the pool. Returns hidden states
        [rows, hidden_size], or on the last stage logits [chunks that want them, vocab_size].
        """
        positions = [p for c in batch.chunks for p in range(c.start, c.start + c.num_tokens)]
        attention = AttentionPass(
            batch,
            self._pool,
            kernels=self.model.kernels,
            is_gathering=self._is_gathering,
            slopes=self.model.alibi_slopes,
            on_layer=on_layer,
        )
        token = current_pass.set(attention)
        try:
            inputs = torch.tensor(batch.token_ids, device=self._device) if hidden is None else hidden
            output = self.model.forward(inputs, torch.tensor(positions, device=self._device))
        finally:
            current_pass.reset(token)
        return self.model.head(output[self._logit_rows(batch)]) if self.model.is_last else output

    def _logit_rows(self, batch: StageBatch) -> Tensor:
        rows: list[int] = []
        end = 0
        for chunk in batch.chunks:
            end += chunk.num_tokens
            if chunk.want_logits:
                rows.append(end - 1)
        return torch.tensor(rows, dtype=torch.long, device=self._device)
