"""What a process does before it says that it is there: the first step on a GPU loads kernels and makes handles, and
that is no part of somebody's time to the first token, or of a recovery."""

from __future__ import annotations

import asyncio

import torch

from common.kv.pool import KvPool
from common.model.batch import SequenceChunk, StageBatch
from common.model.runner import StageRunner
from common.model.sampler import SamplingRow, sample
from common.model.spec import ModelSpec
from common.stage.compute import ComputeThread
from common.stage.options import StageOptions
from dejavu.params import SamplingParams


def warm_up(runner: StageRunner, pool: KvPool, *, hidden_size: int, dtype: torch.dtype, max_tokens: int) -> None:
    """Computes a prompt chunk of up to `max_tokens`, then a token step, in a pool that nobody uses yet."""
    layout = pool.layout
    num_tokens = min(max_tokens, layout.num_blocks * layout.block_size - 1)
    for start, count in ((0, num_tokens), (num_tokens, 1)):
        if count < 1:
            continue
        blocks = range(-(-(start + count) // layout.block_size))
        batch = StageBatch([SequenceChunk(start, count, blocks, want_logits=True)], [0] * count)
        is_first = runner.model.layers[0] == 0
        hidden = None if is_first else torch.zeros(count, hidden_size, dtype=dtype, device=pool.device)
        output = runner.run(batch, hidden)
        if runner.model.is_last:
            params = (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_p=0.9, logprobs=1))
            sample(output.expand(len(params), -1), [SamplingRow(one, 0, start + count) for one in params])
    if pool.device.type == "cuda":
        torch.cuda.synchronize(pool.device)


async def warm_up_on(
    compute: ComputeThread,
    crash: asyncio.Future[None],
    runner: StageRunner,
    pool: KvPool,
    spec: ModelSpec,
    options: StageOptions,
) -> None:
    """On the thread that computes, since what is made for a GPU is made for a thread. Raises what `crash` holds."""
    is_warm: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def work() -> None:
        max_tokens = min(options.chunk_tokens, spec.max_context_tokens - 1)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        warm_up(runner, pool, hidden_size=spec.hidden_size, dtype=dtype, max_tokens=max_tokens)

    compute.submit(work, is_warm.set_result)
    await asyncio.wait([is_warm, crash], return_when=asyncio.FIRST_COMPLETED)
    if crash.done():
        crash.result()
