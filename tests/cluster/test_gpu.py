"""The same system on a GPU: several stages share one card, pools lie in device memory, tokens are the CPU's."""

from __future__ import annotations

import pytest
import torch

from tests.cluster.reference import assert_greedy
from tests.cluster.system import TINY, running
from tests.cluster.test_serving import GREEDY, generate_all, prompts, settled_status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    "layout",
    [
        ("--prompt-stages", "1", "--token-stages", "2"),
        ("--prompt-stages", "2", "--token-stages", "1"),
        ("--colocated",),
    ],
    ids=" ".join,
)
async def test_greedy_tokens_equal_the_cpus(layout: tuple[str, ...]) -> None:
    work = prompts(7, [1, 16, 33, 64, 130, 257])
    with running("--device", "cuda", "--dtype", "float32", "--kv-memory", "64M", *layout) as system:
        tokens = await generate_all(system.endpoint, work, GREEDY)
        await settled_status(system.endpoint)
    for prompt, token_ids in zip(work, tokens, strict=True):
        assert_greedy(TINY, prompt, token_ids)
