"""A whole model in this process, for benchmarks of what streams its KV."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from torch import Tensor

from common.kv.pool import KvPool
from common.model.batch import SequenceChunk, StageBatch
from common.model.kv_layout import fitting_layout
from common.model.loader import load_stage
from common.model.runner import StageRunner
from common.model.spec import ModelSpec, load_spec

BLOCK_SIZE = 16


class OneStage:
    """All layers, and a pool for `num_sequences` of `num_tokens` each, one run of blocks a sequence."""

    def __init__(self, model: str, dtype: str, num_sequences: int, num_tokens: int) -> None:
        self.spec: ModelSpec = load_spec(model, dtype)
        self.layers = (0, self.spec.num_layers)
        self._blocks_each = -(-num_tokens // BLOCK_SIZE)
        one_block = fitting_layout(self.spec, self.layers, BLOCK_SIZE, 1 << 40).bytes_per_block
        layout = fitting_layout(self.spec, self.layers, BLOCK_SIZE, num_sequences * self._blocks_each * one_block)
        self.pool = KvPool.create(layout, name="model")
        self._model = load_stage(self.spec, self.layers, "cpu")
        self._runner = StageRunner(self._model, self.pool)

    def on_pool(self, pool: KvPool) -> StageRunner:
        """The same weights over another pool."""
        return StageRunner(self._model, pool)

    def blocks(self, sequence: int) -> Sequence[int]:
        """The sequence's block table."""
        return range(sequence * self._blocks_each, (sequence + 1) * self._blocks_each)

    def prompt(self, num_tokens: int, seed: int) -> list[int]:
        """Random token ids."""
        draws = random.Random(seed)
        return [draws.randrange(3, self.spec.vocab_size) for _ in range(num_tokens)]

    def prefill(self, sequence: int, prompt: Sequence[int], on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Computes a prompt as one chunk; logits [vocab_size] of its last token."""
        chunk = SequenceChunk(0, len(prompt), self.blocks(sequence), want_logits=True)
        return self._runner.run(StageBatch([chunk], list(prompt)), None, on_layer)[0]

    def step(self, tokens: Sequence[int], positions: Sequence[int], runner: StageRunner | None = None) -> Tensor:
        """One token of sequences 0, 1, ... each; logits [sequences, vocab_size]."""
        chunks = [SequenceChunk(at, 1, self.blocks(index), want_logits=True) for index, at in enumerate(positions)]
        return (runner or self._runner).run(StageBatch(chunks, list(tokens)), None)


def greedy(logits: Tensor) -> list[int]:
    """The likeliest token of each row."""
    return [int(token) for token in logits.reshape(-1, logits.shape[-1]).argmax(-1)]
