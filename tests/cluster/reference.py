"""What the system's answers are held against: transformers' own greedy decoding in float32."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common.model.noise import gumbel_of_vocabulary
from dejavu import SamplingParams

TIE = 1e-4


@functools.cache
def reference_model(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def assert_greedy(model_dir: Path, prompt: list[int], token_ids: list[int]) -> None:
    """Every token is the argmax of the reference's logits after the tokens before it, or ties with it."""
    _assert_best(_logits(model_dir, prompt, token_ids), token_ids)


def assert_seeded(model_dir: Path, prompt: list[int], token_ids: list[int], params: SamplingParams) -> None:
    """Every token is the argmax of the reference's log-probabilities at this temperature plus the published noise of
    (seed, choice 0, position, token), or ties with it."""
    logits = _logits(model_dir, prompt, token_ids).double() / params.temperature
    positions = torch.arange(len(prompt), len(prompt) + len(token_ids))
    seeds = torch.full_like(positions, params.seed or 0)
    noise = gumbel_of_vocabulary(seeds, torch.zeros_like(positions), positions, logits.shape[-1])
    _assert_best(logits + noise, token_ids)


def _logits(model_dir: Path, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]: what the reference says about every one of `token_ids`."""
    assert token_ids
    with torch.inference_mode():
        logits = reference_model(model_dir)(torch.tensor([prompt + token_ids])).logits
    assert isinstance(logits, torch.Tensor)
    return logits[0, len(prompt) - 1 : -1]


def _assert_best(scores: torch.Tensor, token_ids: list[int]) -> None:
    chosen = scores.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    short = (scores.max(dim=-1).values - chosen).max().item()
    assert short <= TIE, f"a token's score is {short:.2e} below the best: {token_ids}"
