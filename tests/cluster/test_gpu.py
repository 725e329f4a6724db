"""The same system on a GPU: several stages share one card, pools lie in device memory, tokens are the CPU's."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from dejavu import AsyncClient
from tests.cluster.reference import assert_greedy, assert_seeded
from tests.cluster.streams import Streams, check
from tests.cluster.system import TINY, pid_of, running
from tests.cluster.test_serving import GREEDY, generate_all, prompts, settled_status
from tests.cluster.test_swapping import SEEDED, token_stages
from tests.unit.kv.sharing import can_share_gpu_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.cluster,
    # every process imports torch and makes a context: there is no forking with CUDA
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ON_GPU = ("--device", "cuda", "--dtype", "float32", "--kv-memory", "64M")


@pytest.mark.parametrize(
    "layout",
    [
        ("--prompt-stages", "1", "--token-stages", "2"),
        ("--prompt-stages", "2", "--token-stages", "1"),
        ("--prompt-split", "4,2", "--token-split", "1,3,2", "--chunk-size", "64"),
        ("--colocated",),
        ("--token-stages", "2", "--link", "zmq"),
    ],
    ids=" ".join,
)
async def test_tokens_equal_the_cpus(layout: tuple[str, ...]) -> None:
    work = prompts(7, [1, 16, 33, 64, 130, 257])
    with running(*ON_GPU, *layout) as system:
        greedy = await generate_all(system.endpoint, work, GREEDY)
        seeded = await generate_all(system.endpoint, work, SEEDED)
        status = await settled_status(system.endpoint)
    for prompt, token_ids in zip(work, greedy, strict=True):
        assert_greedy(TINY, prompt, token_ids)
    for prompt, token_ids in zip(work, seeded, strict=True):
        assert_seeded(TINY, prompt, token_ids, SEEDED)
    links = {service["link"] for service in status["services"] if service["role"] == "prompt_stage"}
    shared = {"cuda_ipc" if can_share_gpu_memory() else "zmq"}
    assert links == (set() if "--colocated" in layout else {"zmq"} if "zmq" in layout else shared)
    assert all(stage["handoff"]["corrupt"] == 0 for stage in token_stages(status))


async def test_tokens_are_the_same_through_a_small_device() -> None:
    work = prompts(31, [1, 15, 16, 17, 33, 50, 64, 65, 100, 130, 120, 117])
    swapping = ("--swap", "on", "--kv-memory", "1M", "--host-kv-memory", "48M")
    with running(*ON_GPU, *swapping, "--token-stages", "3") as system:
        tokens = await generate_all(system.endpoint, work, GREEDY)
        status = await settled_status(system.endpoint)
    for prompt, token_ids in zip(work, tokens, strict=True):
        assert_greedy(TINY, prompt, token_ids)
    for stage in token_stages(status):
        assert stage["device_kv_blocks"]["peak"] <= stage["device_kv_blocks"]["total"]
        assert stage["swapped_in_bytes"] > 0


@pytest.mark.parametrize("more", [(), ("--swap", "on", "--kv-memory", "1536K", "--host-kv-memory", "48M")])
async def test_kv_comes_back_from_the_store(more: tuple[str, ...]) -> None:
    """A store, which knows nothing of CUDA, has read it out of device memory; a spare reads it back into its own."""
    work = prompts(22, [10, 40, 70, 33])
    with running(*ON_GPU, *more, "--token-stages", "2", "--standbys", "1") as system:
        async with AsyncClient(system.endpoint) as client:
            streams = await Streams.begin(client, work)
            os.kill(await pid_of(client, "token-0-stage-1"), signal.SIGKILL)
            answers = await streams.ended()
            counters = (await client.status())["counters"]
        await settled_status(system.endpoint)
    check(work, answers)
    assert counters["recoveries"] >= len(work)
    assert counters["recomputed_tokens"] <= 32 * len(work)


async def test_a_pipeline_changes_its_role_and_back() -> None:
    """With other memory of the GPU each time, in the same process."""
    work = prompts(5, [1, 33, 70])
    with running(*ON_GPU, "--prompt-pipelines", "2") as system:
        async with AsyncClient(system.endpoint) as client:
            for name, role in (("prompt-1", "token"), ("token-2", "prompt")):
                await client.convert(name, role)
                for prompt, tokens in zip(work, await generate_all(system.endpoint, work, GREEDY), strict=True):
                    assert_greedy(TINY, prompt, tokens)
        await settled_status(system.endpoint)
