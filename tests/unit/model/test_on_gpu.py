"""Every family on a GPU gives what transformers gives on the CPU; and what a process computes first changes nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path

import pytest
import torch

from common.kv.pool import KvPool
from common.model.batch import SequenceChunk, StageBatch
from common.model.spec import load_spec
from common.stage.compute import ComputeThread
from common.stage.options import parse_stage_options
from common.stage.warm_up import warm_up, warm_up_on
from tests.unit.model.checkpoints import CONFIGS, NUM_LAYERS, VOCAB_SIZE, save_checkpoint
from tests.unit.model.generation import NATIVE, NUM_BLOCKS, ON_GPU, TORCH, Engine, assert_greedy, generate, make_stages

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
OPTIONS = [
    "--name", "n", "--etcd", "e", "--model", "m", "--pipeline", "p", "--stage-index", "1", "--num-stages", "2",
    "--layers", "0:1", "--kv-memory", "1", "--chunk-size", "40",
]  # fmt: skip
PROMPT_LENGTHS = (1, 16, 37, 50)


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("name", CONFIGS)
    def test_greedy_tokens_equal_transformers_on_the_cpu(self, name: str, tmp_path: Path) -> None:
        model = save_checkpoint(name, tmp_path)
        spec = load_spec(tmp_path, "float32")
        draws = random.Random(5)
        prompts = [[draws.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENGTHS]
        for counts, block_size, chunk_size in (([4], 16, 64), ([1, 2, 1], 4, 13)):
            stages = make_stages(spec, counts, block_size, ON_GPU)
            for free in (draws.sample(range(NUM_BLOCKS), NUM_BLOCKS), list(range(NUM_BLOCKS))[::-1]):
                for sequence in generate(stages, prompts, free, block_size, chunk_size):
                    assert_greedy(model, sequence)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_half_precision_is_close_to_float32(self, name: str, dtype: str, tmp_path: Path) -> None:
        model = save_checkpoint(name, tmp_path)
        (runner,) = make_stages(load_spec(tmp_path, dtype), [NUM_LAYERS], 4, ON_GPU)
        ids, blocks = list(range(10, 40)), list(range(0, 16, 2))
        runner.run(StageBatch([SequenceChunk(0, 29, blocks, False)], ids[:29]), None)
        logits = runner.run(StageBatch([SequenceChunk(29, 1, blocks, True)], ids[29:]), None)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1]
        assert logits.dtype == getattr(torch, dtype)
        assert torch.nn.functional.cosine_similarity(logits[0].float().cpu(), expected, dim=0) > 0.99

    def test_float32_is_not_tf32(self, tmp_path: Path) -> None:
        save_checkpoint("llama", tmp_path)
        make_stages(load_spec(tmp_path), [NUM_LAYERS], 4, ON_GPU)
        one = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
        there = (one.cuda() @ one.cuda()).cpu().double()
        exact = one.double() @ one.double()
        # TF32 keeps 10 bits of each factor: its error is some hundred times larger
        assert float((there - exact).abs().max()) < 1e-3


@pytest.mark.parametrize("engine", [NATIVE, TORCH, pytest.param(ON_GPU, marks=on_gpu)])
def test_warming_up_changes_no_token(engine: Engine, tmp_path: Path) -> None:
    model = save_checkpoint("qwen3", tmp_path)
    spec = load_spec(tmp_path, "float32")
    stages = make_stages(spec, [1, 2, 1], 4, engine)
    for stage, max_tokens in zip(stages, (64, 5, 10_000), strict=True):
        pool = stage._pool
        assert isinstance(pool, KvPool)
        warm_up(stage, pool, hidden_size=spec.hidden_size, dtype=torch.float32, max_tokens=max_tokens)
    first = stages[0]._pool.layer(0)
    assert all(bool(part.any()) for part in first)  # it did compute
    (sequence,) = generate(stages, [list(range(3, 40))], list(range(NUM_BLOCKS)), 4, 16)
    assert_greedy(model, sequence)


async def test_who_warms_up_hears_of_the_end_and_of_a_crash(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    spec = load_spec(tmp_path, "float32")
    stage = make_stages(spec, [NUM_LAYERS - 1, 1], 4, TORCH)[-1]
    pool = stage._pool
    assert isinstance(pool, KvPool)
    options = parse_stage_options("prompt_stage", None, OPTIONS)
    loop = asyncio.get_running_loop()
    crash: asyncio.Future[None] = loop.create_future()
    compute = ComputeThread(loop, crash.set_exception)
    await warm_up_on(compute, crash, stage, pool, spec, options)
    misfit = dataclasses.replace(spec, hidden_size=spec.hidden_size + 1)
    with pytest.raises(RuntimeError):
        await warm_up_on(compute, crash, stage, pool, misfit, options)
    compute.close()
