"""What the system's answers are held against: transformers' own greedy decoding in float32."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

TIE = 1e-4


@functools.cache
def reference_model(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def assert_greedy(model_dir: Path, prompt: list[int], token_ids: list[int]) -> None:
    """Every token is the argmax of the reference's logits after the tokens before it, or ties with it."""
    assert token_ids
    model = reference_model(model_dir)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    best = logits.max(dim=-1).values
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    short = (best - chosen).max().item()
    assert short <= TIE, f"a token's logit is {short:.2e} below the best: {token_ids}"
