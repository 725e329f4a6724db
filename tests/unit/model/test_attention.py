"""Attention over scattered blocks against plain attention, sequence by sequence."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from common.kv.layout import PoolLayout
from common.kv.pool import KvPool
from common.model import attention as attention_module
from common.model.attention import AttentionPass
from common.model.batch import SequenceChunk, StageBatch
from common.model.native import load_kernels
from common.model.plan import Planner
from tests.unit.model.generation import GATHERING, NATIVE, ON_GPU, TORCH, Engine

NUM_BLOCKS = 120
CHUNKS = ((0, 1), (30, 1), (0, 21), (16, 1), (17, 9), (255, 1), (64, 3), (200, 40), (31, 2), (60, 5), (90, 7))
"""(start, number of tokens): single tokens and prompt chunks, mixed. GPUs take 32 keys at a time: some of them end with
one."""
SLOPE = 0.3


ENGINES = [
    NATIVE,
    TORCH,
    GATHERING,
    pytest.param(
        ON_GPU,
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@dataclass(frozen=True, slots=True)
class Case:
    """Shapes and masks of one run."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    window: int | None = None
    has_alibi: bool = False
    dtype: torch.dtype = torch.float32


CASES = [
    Case(4, 4, 16),
    Case(12, 4, 64),
    Case(14, 2, 64, block_size=8),
    Case(6, 1, 80),
    Case(4, 2, 128, window=18),
    Case(4, 2, 96, window=1000),
    Case(5, 5, 32, has_alibi=True),
    Case(3, 3, 48, has_alibi=True, window=18),
    Case(12, 4, 64, dtype=torch.bfloat16),
    Case(8, 2, 128, dtype=torch.bfloat16),
    Case(8, 8, 64, has_alibi=True, dtype=torch.bfloat16),
]


def make_batch(block_size: int, is_scattered: bool) -> StageBatch:
    draws = random.Random(3)
    free = draws.sample(range(NUM_BLOCKS), NUM_BLOCKS) if is_scattered else list(range(NUM_BLOCKS))
    chunks: list[SequenceChunk] = []
    for start, num_tokens in CHUNKS:
        num_blocks = -(-(start + num_tokens) // block_size)
        chunks.append(SequenceChunk(start, num_tokens, [free.pop(0) for _ in range(num_blocks)], True))
    return StageBatch(chunks, [0] * sum(chunk.num_tokens for chunk in chunks))


def expected(case: Case, chunk: SequenceChunk, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """query [rows, heads, dim], keys and values of the whole sequence [length, kv_heads, dim], all float32."""
    group = case.num_heads // case.num_kv_heads
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    rows = torch.arange(chunk.start, chunk.start + chunk.num_tokens)[:, None]
    distance = rows - torch.arange(len(keys))[None, :]
    if case.has_alibi:
        scores -= (torch.arange(1, case.num_heads + 1) * SLOPE)[:, None, None] * distance
    is_hidden = distance < 0
    if case.window is not None:
        is_hidden |= distance >= case.window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(is_hidden, float("-inf")).softmax(-1), values)


def make_pool(case: Case, device: str) -> KvPool:
    """Full of numbers that are nobody's."""
    num_blocks, name = NUM_BLOCKS * 16 // case.block_size, str(case.dtype).removeprefix("torch.")
    layout = PoolLayout(0, 1, num_blocks, case.block_size, case.num_kv_heads, case.head_dim, name, "f")
    pool = KvPool.create(layout, device)
    for part in pool.layer(0):
        part.normal_()
    return pool


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_no_number_stays_with_its_sequence(engine: Engine) -> None:
    """Half precision overflows."""
    case = Case(4, 2, 64)
    pool = make_pool(case, engine.device)
    for part in pool.layer(0):
        part[:2] = float("nan")
    batch = StageBatch([SequenceChunk(20, 1, [0, 1], True), SequenceChunk(2, 1, [5], True)], [0, 0])
    attention = AttentionPass(
        batch,
        pool,
        kernels=load_kernels(case.dtype) if engine.is_native else None,
        is_gathering=engine.is_gathering,
    )
    with torch.inference_mode():
        query, key, value = (torch.randn(2, heads, case.head_dim, device=engine.device) for heads in (4, 2, 2))
        output = attention.attend(0, query, key, value, 0.2)
    assert output[0].isnan().all() and output[1].isfinite().all()


@pytest.mark.parametrize("is_scattered", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_attend_to_what_precedes_them(case: Case, engine: Engine, is_scattered: bool) -> None:
    torch.manual_seed(1)
    pool = make_pool(case, engine.device)
    batch = make_batch(case.block_size, is_scattered)
    num_rows = len(batch.token_ids)
    query = torch.randn(num_rows, case.num_heads, case.head_dim).to(case.dtype)
    key, value = (torch.randn(num_rows, case.num_kv_heads, case.head_dim).to(case.dtype) for _ in range(2))
    slopes = torch.arange(1, case.num_heads + 1) * SLOPE
    heard: list[int] = []
    attention = AttentionPass(
        batch,
        pool,
        kernels=load_kernels(case.dtype) if engine.is_native else None,
        is_gathering=engine.is_gathering,
        slopes=slopes.to(engine.device) if case.has_alibi else None,
        on_layer=heard.append,
    )
    with torch.inference_mode():
        ours, keys, values = (part.to(engine.device) for part in (query, key, value))
        output = attention.attend(0, ours, keys, values, 0.2, case.window).cpu()
    assert heard == [0]
    row = 0
    for chunk in batch.chunks:
        rows = slice(row, row + chunk.num_tokens)
        length = chunk.start + chunk.num_tokens
        stored_keys, stored_values = (
            part[list(chunk.blocks)].flatten(0, 1)[:length].float().cpu() for part in pool.layer(0)
        )
        assert torch.equal(stored_keys[chunk.start :], key[rows].float())
        assert torch.equal(stored_values[chunk.start :], value[rows].float())
        wanted = expected(case, chunk, query[rows].float(), stored_keys, stored_values, 0.2)
        tolerance = 4e-2 if case.dtype != torch.float32 else 2e-5 if engine.device == "cpu" else 1e-4
        assert torch.allclose(output[rows].float(), wanted, atol=tolerance, rtol=tolerance)
        row += chunk.num_tokens


@pytest.mark.parametrize("max_slots", [0, 100])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_attend_to_the_same_where_few_are_gathered_at_a_time(
    case: Case, max_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot_bytes = 2 * case.num_kv_heads * case.head_dim * case.dtype.itemsize
    monkeypatch.setattr(attention_module, "MAX_GATHERED_BYTES", max_slots * slot_bytes)
    test_rows_attend_to_what_precedes_them(case, GATHERING, is_scattered=True)


@pytest.mark.parametrize("window", [None, 18])
@pytest.mark.parametrize("max_slots", [1, 48, 100, 10_000])
def test_what_is_gathered_at_a_time_is_bounded(max_slots: int, window: int | None) -> None:
    batch = make_batch(16, is_scattered=True)
    planner = Planner(batch.chunks, 16, torch.device("cpu"), torch.float32, None)
    padded = planner.padded(window, max_slots)
    assert all(part.index.numel() <= max_slots or len(part.rows) == 1 for part in padded)
    (everything,) = planner.padded(window, 1 << 40)
    assert sorted(torch.cat([part.rows for part in padded]).tolist()) == everything.rows.tolist()
