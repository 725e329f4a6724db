"""The checkpoint in models/tiny/ is complete, small, and completes text in English."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHECKPOINT = Path(__file__).parents[2] / "models" / "tiny"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
MAX_SIZE_BYTES = 12_000_000
# Measured 17.4 on SNIPPET (a model that guesses gives 4096), and half as much again for a retrained one.
MAX_PERPLEXITY = 26.0
# Written for this test in the manner of the training text, so it is in no training passage.
SNIPPET = (
    "She had not expected to see him there, and was so much surprised that she could not speak for some "
    "minutes. Her sister, however, was very happy, and they walked together to the house, where their "
    "mother was waiting for them with a letter from London. It was impossible not to be pleased with so "
    "agreeable a young man, and every body was soon talking of the ball."
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_checkpoint_is_complete_and_small() -> None:
    assert all((CHECKPOINT / name).is_file() for name in FILES)
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= MAX_SIZE_BYTES


def test_layers_split_over_one_two_or_three_stages() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_hidden_layers"] == 6
    assert config["num_key_value_heads"] < config["num_attention_heads"]


@pytest.mark.parametrize("text", [SNIPPET, "  two  spaces\n\nand a line", "naïve café 漢字 🙂", ""])
def test_tokenizer_adds_only_bos_and_gives_the_text_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:] == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids[1:]) == text


def test_perplexity_on_unseen_english_is_low(tokenizer: Any, model: Any) -> None:
    ids = torch.tensor([tokenizer.encode(SNIPPET)])
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss
    assert torch.exp(loss).item() < MAX_PERPLEXITY


def test_greedy_completion_consists_of_english_words(tokenizer: Any, model: Any) -> None:
    prompt = tokenizer("It was a fine morning in May, and", return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    completion = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    # Whole words are the vocabulary entries that begin with a space, which byte-level BPE writes as U+0120.
    known = {entry[1:].lower() for entry in tokenizer.get_vocab() if entry.startswith("\u0120")}
    words = re.findall(r"[a-z]+", completion.lower())
    assert len(words) >= 20
    assert sum(word in known for word in words) / len(words) > 0.8
    assert len(set(words)) >= 12
