"""Greedy generation on stages: prompts in chunks, mixed with the token steps of other sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from common.kv.layout import PoolLayout
from common.kv.pool import KvPool
from common.model.batch import SequenceChunk, StageBatch
from common.model.loader import load_stage
from common.model.runner import StageRunner
from common.model.spec import ModelSpec, split_layers

TIE = 1e-4
NUM_BLOCKS = 100
NUM_NEW = 10


@dataclass(frozen=True, slots=True)
class Engine:
    """A way to compute: the native kernels, torch token by token, or torch on padded copies."""

    is_native: bool
    is_gathering: bool = False
    device: str = "cpu"


NATIVE = Engine(is_native=True)
TORCH = Engine(is_native=False)
GATHERING = Engine(is_native=False, is_gathering=True)
ON_GPU = Engine(is_native=False, is_gathering=True, device="cuda")


@dataclass(slots=True)
class Generation:
    """A sequence that is being generated."""

    tokens: list[int]
    num_prompt: int
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


def make_stages(spec: ModelSpec, counts: Sequence[int], block_size: int, engine: Engine = NATIVE) -> list[StageRunner]:
    """Runners of consecutive stages with `counts` layers."""
    runners = []
    for layers in split_layers(spec.num_layers, len(counts), counts):
        layout = PoolLayout(
            *layers, NUM_BLOCKS, block_size, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.fingerprint
        )
        model = load_stage(spec, layers, engine.device, is_native=engine.is_native)
        runners.append(StageRunner(model, KvPool.create(layout, engine.device), is_gathering=engine.is_gathering))
    return runners


def run(stages: Sequence[StageRunner], batch: StageBatch) -> Tensor:
    """One pass through all stages: logits."""
    hidden: Tensor | None = None
    for stage in stages:
        hidden = stage.run(batch, hidden)
    assert hidden is not None
    return hidden


def generate(
    stages: Sequence[StageRunner], prompts: Sequence[Sequence[int]], free: list[int], block_size: int, chunk_size: int
) -> list[Generation]:
    """`NUM_NEW` greedy tokens for each prompt; blocks come from the end of `free`."""
    sequences = [Generation(list(prompt), len(prompt)) for prompt in prompts]
    while live := [s for s in sequences if len(s.tokens) - s.num_prompt < NUM_NEW]:
        chunks: list[SequenceChunk] = []
        token_ids: list[int] = []
        for sequence in live:
            count = min(chunk_size, len(sequence.tokens) - sequence.num_computed)
            end = sequence.num_computed + count
            while len(sequence.blocks) * block_size < end:
                sequence.blocks.append(free.pop())
            draws = end == len(sequence.tokens)
            chunks.append(SequenceChunk(sequence.num_computed, count, sequence.blocks, draws))
            token_ids += sequence.tokens[sequence.num_computed : end]
            sequence.num_computed = end
        logits = iter(run(stages, StageBatch(chunks, token_ids)))
        for sequence, chunk in zip(live, chunks, strict=True):
            if chunk.want_logits:
                sequence.tokens.append(int(next(logits).argmax()))
    return sequences


def assert_greedy(model: Any, sequence: Generation) -> None:
    """What was generated is what transformers' model would choose, ties aside."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence.tokens])).logits[0, sequence.num_prompt - 1 : -1]
    chosen = logits.gather(1, torch.tensor(sequence.tokens[sequence.num_prompt :])[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() <= TIE
