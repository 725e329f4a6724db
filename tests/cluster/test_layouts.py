"""Whatever the cut, the tokens are the same: transformers' own when greedy, those of the published noise when drawn."""

from __future__ import annotations

from typing import Any

import pytest

from dejavu import SamplingParams
from tests.cluster.reference import assert_greedy, assert_seeded
from tests.cluster.system import TINY, running
from tests.cluster.test_serving import FLOAT32, GREEDY, generate_all, prompts, settled_status

pytestmark = pytest.mark.cluster

CHUNK, BLOCK = 64, 16
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 31, 32, 33, CHUNK - 1, CHUNK, CHUNK + 1, 100, 130, 200, 257, 300]
SEEDED = SamplingParams(temperature=0.9, seed=2**40 + 7, max_tokens=16, ignore_eos=True)


def stages(num_prompt_stages: int, num_token_stages: int, *more: str) -> tuple[str, ...]:
    return ("--prompt-stages", str(num_prompt_stages), "--token-stages", str(num_token_stages), *more)


ALWAYS = [
    stages(1, 2, "--link", "zmq"),
    ("--prompt-split", "1,2,3", "--token-split", "5,1"),
    ("--prompt-pipelines", "2", "--token-pipelines", "2"),
    ("--colocated", "--token-split", "2,4"),
]
MATRIX = [
    *(stages(p, t) for p in (1, 2, 3) for t in (1, 2, 3)),
    stages(3, 3, "--link", "zmq"),
    ("--prompt-split", "5,1", "--token-split", "1,4,1"),
    ("--prompt-split", "1,5", "--token-split", "3,3", "--link", "zmq"),
    ("--prompt-split", "1,1,1,1,1,1", "--token-stages", "1"),
    *(("--colocated", "--token-stages", str(t)) for t in (1, 2, 3)),
    ("--colocated", "--token-stages", "2", "--token-pipelines", "2"),
]


@pytest.mark.parametrize(
    "layout", [*ALWAYS, *(pytest.param(layout, marks=pytest.mark.matrix) for layout in MATRIX)], ids=" ".join
)
async def test_tokens_are_the_same_in_every_layout(layout: tuple[str, ...]) -> None:
    work = prompts(7, LENGTHS)
    with running(*FLOAT32, "--chunk-size", str(CHUNK), *layout) as system:
        greedy = await generate_all(system.endpoint, work, GREEDY)
        seeded = await generate_all(system.endpoint, work[-6:], SEEDED)
        alone = await generate_all(system.endpoint, work[-1:], SEEDED)
        check_links(await settled_status(system.endpoint), layout)
    for prompt, token_ids in zip(work, greedy, strict=True):
        assert len(token_ids) == GREEDY.max_tokens
        assert_greedy(TINY, prompt, token_ids)
    for prompt, token_ids in zip([*work[-6:], work[-1]], [*seeded, *alone], strict=True):
        assert len(token_ids) == SEEDED.max_tokens
        assert_seeded(TINY, prompt, token_ids, SEEDED)


def check_links(status: dict[str, Any], layout: tuple[str, ...]) -> None:
    links = {service.get("link") for service in status["services"] if service["role"] == "prompt_stage"}
    assert links == (set() if "--colocated" in layout else {"zmq"} if "zmq" in layout else {"shm"})


async def test_blocks_run_out_and_everything_still_ends() -> None:
    """A pool that holds a few sequences: the rest queue or are preempted; tokens stay exact."""
    work = prompts(13, [60] * 12)
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for layout in (("--token-stages", "2"), ("--colocated",)):
        with running("--dtype", "float32", "--kv-memory", "900K", *layout) as system:
            tokens = await generate_all(system.endpoint, work, params)
            await settled_status(system.endpoint)
        for prompt, token_ids in zip(work, tokens, strict=True):
            assert len(token_ids) == 60
            assert_greedy(TINY, prompt, token_ids)
