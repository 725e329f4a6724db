"""Random checkpoints of every family through real processes: sharded files, two prompt stages, three token stages."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest
import torch

from dejavu import AsyncClient, SamplingParams
from tests.cluster.reference import assert_greedy
from tests.cluster.system import running
from tests.unit.model.checkpoints import CONFIGS, VOCAB_SIZE, save_checkpoint

pytestmark = pytest.mark.cluster

ALWAYS = ("mixtral", "bloom")
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def prompts() -> list[list[int]]:
    draws = random.Random(4)
    return [[draws.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (1, 7, 8, 9, 16, 33, 70)]


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in ALWAYS else pytest.mark.matrix) for f in sorted(CONFIGS)]
)
async def test_every_family_gives_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    work = prompts()
    first = make_checkpoint(family, tmp_path, work[2])
    cut = ("--prompt-split", "3,1", "--token-split", "1,2,1", "--block-size", "8", "--chunk-size", "32")
    with running("--dtype", "float32", "--kv-memory", "8M", *cut, model=tmp_path) as system:
        async with AsyncClient(system.endpoint) as client:
            completions = await asyncio.gather(*(client.generate(prompt, GREEDY) for prompt in work))
            ended = await client.generate(work[2], SamplingParams(temperature=0.0, max_tokens=20))
    for prompt, completion in zip(work, completions, strict=True):
        assert len(completion.token_ids) == GREEDY.max_tokens
        assert_greedy(tmp_path, prompt, completion.token_ids)
    assert (ended.token_ids, ended.finish_reason, ended.text) == ([first], "stop", "")


def make_checkpoint(family: str, folder: Path, prompt: list[int]) -> int:
    """Saves one whose EOS is the first token after `prompt`; returns that token."""
    model = save_checkpoint(family, folder)
    with torch.inference_mode():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [VOCAB_SIZE - 1, first]}))
    return first
