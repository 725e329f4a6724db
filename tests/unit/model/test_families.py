"""Every family: greedy tokens equal those of transformers, through stages, ragged batches and scattered blocks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from common.model.batch import SequenceChunk, StageBatch
from common.model.spec import load_spec
from tests.unit.model.checkpoints import CONFIGS, NUM_LAYERS, VOCAB_SIZE, save_checkpoint
from tests.unit.model.generation import (
    GATHERING,
    NATIVE,
    NUM_BLOCKS,
    NUM_NEW,
    TORCH,
    Engine,
    assert_greedy,
    generate,
    make_stages,
)

PROMPT_LENGTHS = (1, 16, 37, 50)
LAYOUTS: list[tuple[Engine, list[int], int, int]] = [
    (NATIVE, [4], 16, 64),
    (NATIVE, [1, 3], 4, 13),
    (NATIVE, [2, 1, 1], 4, 5),
    (TORCH, [3, 1], 4, 13),
    (GATHERING, [1, 2, 1], 16, 7),
]
"""Engine, layers of the stages, block size, chunk size."""


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model = save_checkpoint(name, tmp_path)
    spec = load_spec(tmp_path, "float32")
    draws = random.Random(5)
    prompts = [[draws.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
    for engine, counts, block_size, chunk_size in LAYOUTS:
        stages = make_stages(spec, counts, block_size, engine)
        scattered = draws.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        in_a_row = list(range(NUM_BLOCKS))[::-1]
        for free in (scattered, in_a_row):
            for sequence in generate(stages, prompts, free, block_size, chunk_size):
                assert_greedy(model, sequence)


def test_tokens_equal_those_of_generate(tmp_path: Path) -> None:
    model = save_checkpoint("llama", tmp_path)
    prompt = list(range(3, 40))
    (sequence,) = generate(make_stages(load_spec(tmp_path), [2, 2], 16), [prompt], list(range(NUM_BLOCKS)), 16, 8)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False)
    assert sequence.tokens == expected[0].tolist()


def test_a_bfloat16_checkpoint_served_as_float32(tmp_path: Path) -> None:
    model = save_checkpoint("llama", tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    spec = load_spec(tmp_path / "half", "float32")
    (sequence,) = generate(make_stages(spec, [4], 16), [[5, 6, 7]], list(range(NUM_BLOCKS)), 16, 8)
    assert_greedy(model.float(), sequence)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "gpt2", "bloom", "opt"])
@pytest.mark.parametrize("engine", [NATIVE, TORCH])
def test_bfloat16_logits_are_close_to_float32(name: str, engine: Engine, tmp_path: Path) -> None:
    model = save_checkpoint(name, tmp_path)
    (runner,) = make_stages(load_spec(tmp_path, "bfloat16"), [NUM_LAYERS], 4, engine)
    ids = list(range(10, 40))
    blocks = list(range(0, 16, 2))
    runner.run(StageBatch([SequenceChunk(0, 29, blocks, False)], ids[:29]), None)
    logits = runner.run(StageBatch([SequenceChunk(29, 1, blocks, True)], ids[29:]), None)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1]
    assert logits.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(logits[0].float(), expected, dim=0) > 0.99


def test_layers_are_reported_as_soon_as_their_kv_is_there(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    (runner,) = make_stages(load_spec(tmp_path), [NUM_LAYERS], 4)
    pool = runner._pool
    heard: list[int] = []

    def on_layer(local_layer: int) -> None:
        heard.append(local_layer)
        for part in pool.layer(local_layer):
            assert part[7].flatten(1)[:3].any(dim=1).all()
        for later in range(local_layer + 1, NUM_LAYERS):
            assert not pool.layer(later)[0].any()

    runner.run(StageBatch([SequenceChunk(0, 3, [7], True)], [5, 6, 7]), None, on_layer)
    assert heard == list(range(NUM_LAYERS))


def test_a_stage_leaves_its_input_as_it_was(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    first, last = make_stages(load_spec(tmp_path), [2, 2], 4)
    batch = StageBatch([SequenceChunk(0, 3, [0], True)], [5, 6, 7])
    hidden = first.run(batch, None)
    before = hidden.clone()
    last.run(batch, hidden)
    assert torch.equal(hidden, before)


def test_only_wanted_rows_get_logits(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    (runner,) = make_stages(load_spec(tmp_path), [NUM_LAYERS], 4)
    chunks = [SequenceChunk(0, 2, [0], True), SequenceChunk(0, 3, [1], False), SequenceChunk(0, 1, [2], True)]
    together = runner.run(StageBatch(chunks, [5, 6, 7, 8, 9, 10]), None)
    alone = runner.run(StageBatch([SequenceChunk(0, 1, [3], True)], [10]), None)
    assert together.shape == (2, VOCAB_SIZE)
    assert torch.allclose(together[1], alone[0], atol=1e-4)
