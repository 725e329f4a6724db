"""Every family: greedy tokens equal those of transformers, through stages, ragged batches and scattered blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.kv.layout import PoolLayout
from common.kv.pool import KvPool
from common.model.batch import SequenceChunk, StageBatch
from common.model.loader import load_stage
from common.model.runner import StageRunner
from common.model.spec import ModelSpec, load_spec, split_layers
from dejavu.errors import ConfigurationError
from tests.unit.model.checkpoints import CONFIGS, NUM_LAYERS, VOCAB_SIZE, save_checkpoint

TIE = 1e-4
BLOCK_SIZE = 4
NUM_BLOCKS = 80
NUM_NEW = 10
PROMPT_LENGTHS = (1, 16, 37, 50)
CHUNK_TOKENS = 13


@dataclass
class Generation:
    """A sequence that is being generated."""

    tokens: list[int]
    num_prompt: int
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)


def make_stages(spec: ModelSpec, counts: Sequence[int]) -> list[StageRunner]:
    runners = []
    for layers in split_layers(spec.num_layers, len(counts), counts):
        layout = PoolLayout(
            *layers, NUM_BLOCKS, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, spec.dtype, spec.fingerprint
        )
        runners.append(StageRunner(load_stage(spec, layers), KvPool.create(layout)))
    return runners


def run(stages: list[StageRunner], batch: StageBatch) -> Tensor:
    hidden: Tensor | None = None
    for stage in stages:
        hidden = stage.run(batch, hidden)
    assert hidden is not None
    return hidden


def generate(stages: list[StageRunner], prompts: list[list[int]], free: list[int]) -> list[Generation]:
    """Prompts in chunks, mixed with the token steps of those that are done with theirs."""
    sequences = [Generation(list(prompt), len(prompt)) for prompt in prompts]
    while live := [s for s in sequences if len(s.tokens) - s.num_prompt < NUM_NEW]:
        chunks: list[SequenceChunk] = []
        token_ids: list[int] = []
        for sequence in live:
            count = min(CHUNK_TOKENS, len(sequence.tokens) - sequence.num_computed)
            end = sequence.num_computed + count
            while len(sequence.blocks) * BLOCK_SIZE < end:
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
    with torch.no_grad():
        logits = model(torch.tensor([sequence.tokens])).logits[0, sequence.num_prompt - 1 : -1]
    chosen = logits.gather(1, torch.tensor(sequence.tokens[sequence.num_prompt :])[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() <= TIE


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = save_checkpoint(name, tmp_path)
    spec = load_spec(tmp_path, "float32")
    draws = random.Random(5)
    prompts = [[draws.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    for counts in ([4], [1, 3], [2, 1, 1]):
        scattered = draws.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        in_a_row = list(range(NUM_BLOCKS))[::-1]
        for free in (scattered, in_a_row):
            for sequence in generate(make_stages(spec, counts), prompts, list(free)):
                assert_greedy(model, sequence)


def test_a_stage_reads_only_its_own_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint("llama", tmp_path)
    spec = load_spec(tmp_path)
    for file in {file for key, file in spec.keys.items() if ".layers.0." in key or "embed" in key}:
        if all(f != file for key, f in spec.keys.items() if ".layers.2." in key):
            (tmp_path / file).unlink()
    load_stage(spec, (2, 3))


def test_layers_are_reported_as_soon_as_their_kv_is_there(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    (runner,) = make_stages(load_spec(tmp_path), [4])
    heard: list[int] = []
    runner.run(StageBatch([SequenceChunk(0, 3, [0], True)], [5, 6, 7]), None, heard.append)
    assert heard == list(range(NUM_LAYERS))


def test_bfloat16_file_served_as_float32(tmp_path: Path) -> None:
    model = save_checkpoint("llama", tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    spec = load_spec(tmp_path / "half", "float32")
    (sequence,) = generate(make_stages(spec, [4]), [[5, 6, 7]], list(range(NUM_BLOCKS)))
    assert_greedy(model.float(), sequence)


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a directory"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        load_spec(tmp_path)
    save_checkpoint("llama", tmp_path, "10MB")
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        load_spec(tmp_path)
    file.write_bytes(whole)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba"'))
    with pytest.raises(ConfigurationError, match="supported are .*llama"):
        load_spec(tmp_path)


@pytest.mark.parametrize(("num_stages", "counts"), [(5, None), (2, [1, 1]), (2, [4, 0])])
def test_impossible_splits_are_refused(num_stages: int, counts: list[int] | None) -> None:
    with pytest.raises(ConfigurationError):
        split_layers(NUM_LAYERS, num_stages, counts)
