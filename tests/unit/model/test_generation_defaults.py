"""What a checkpoint says about generating with it holds as it does for transformers' own greedy `generate`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.ends import finish_reason
from common.model.generation import GenerationDefaults
from common.model.sampler import SamplingRow, sample
from common.model.spec import ModelSpec, load_spec
from dejavu import SamplingParams
from dejavu.errors import ConfigurationError
from tests.unit.model.checkpoints import save_checkpoint

PROMPT = [5, 6, 7, 5]
NUM_NEW = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)


def greedy(model: Any, spec: ModelSpec, asked: SamplingParams) -> list[int]:
    """What the sampler draws from this model's logits until the end."""
    params = spec.generation.complete(asked, len(PROMPT))
    output: list[int] = []
    while not output or finish_reason(params, spec.eos_token_ids, output[-1], len(output)) is None:
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT + output])).logits[0, -1:]
        position = len(PROMPT) + len(output)
        row = SamplingRow(params, 0, position, PROMPT, output, spec.eos_token_ids, len(output))
        output.append(sample(logits, [row])[0].token_id)
    return output


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"repetition_penalty": None, "min_length": None},
        {"min_new_tokens": 9},
        {"min_new_tokens": NUM_NEW + 9},
        {"min_length": 9},
        {"min_length": 2},
        {"min_length": 20, "min_new_tokens": 3},
        {"repetition_penalty": 1.1, "min_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_k": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.filterwarnings("ignore:Unfeasible length:UserWarning")
def test_greedy_is_what_transformers_generates(name: str, said: dict[str, Any], tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    # most tokens end the text, so that it shows where they may not
    ends = list(range(0, 128, 2))
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    document = (config if name == "config.json" else {}) | {"eos_token_id": ends} | said
    (tmp_path / name).write_text(json.dumps(document))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = torch.tensor([PROMPT])
    expected = model.generate(inputs, do_sample=False, max_new_tokens=NUM_NEW, pad_token_id=0)[0, len(PROMPT) :]
    assert greedy(model, load_spec(tmp_path), GREEDY) == expected.tolist()


def test_a_request_that_says_it_itself_wins() -> None:
    model_says = GenerationDefaults(Path("f"), repetition_penalty=1.3, min_new_tokens=5)
    asked = SamplingParams(repetition_penalty=1.0, min_tokens=0)
    assert model_says.complete(asked, 3) == asked
    left = model_says.complete(SamplingParams(seed=4, max_tokens=4), 3)
    assert (left.repetition_penalty, left.min_tokens, left.seed) == (1.3, 4, 4)
    assert model_says.complete(left, 3) == left


@pytest.mark.parametrize(
    ("said", "remark"),
    [
        ({"no_repeat_ngram_size": 6, "num_beams": 4}, "no_repeat_ngram_size 6, num_beams 4: not supported"),
        ({"suppress_tokens": list(range(50))}, r"suppress_tokens \.\.\.: not supported"),
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty 1.5: not supported"),
        ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size 2: not supported"),
        ({"token_healing": True}, "token_healing True: not supported"),
        ({"forced_eos_token_id": 0}, "forced_eos_token_id 0: not supported"),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8}, "suggests temperature 0.7, top_p 0.8"),
    ],
)
def test_what_is_not_done_is_told(said: dict[str, Any], remark: str, tmp_path: Path) -> None:
    (told,) = GenerationDefaults.of(said, tmp_path / "file.json").remarks()
    assert told.startswith(f"{tmp_path / 'file.json'}: ")
    assert re.search(remark, told)


@pytest.mark.parametrize(
    "said",
    [
        {"repetition_penalty": 1.05, "min_length": 3, "max_length": 4096, "pad_token_id": 0, "use_cache": True},
        {"no_repeat_ngram_size": 0, "num_beams": 1, "bad_words_ids": None, "suppress_tokens": [], "guidance_scale": 1},
        {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "token_healing": False},
        {"do_sample": True, "temperature": 1.0, "top_p": 1, "top_k": 0},
        {"do_sample": False, "temperature": 0.6},
    ],
)
def test_what_changes_nothing_is_not_worth_a_word(said: dict[str, Any]) -> None:
    assert not [*GenerationDefaults.of(said, Path("f")).remarks()]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", "1.1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", True),
        ("min_new_tokens", -1),
        ("min_new_tokens", 2.0),
        ("min_length", "many"),
    ],
)
def test_values_that_cannot_be_are_named(field: str, value: object, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(ConfigurationError, match=rf"/generation_config\.json: {field} "):
        load_spec(tmp_path)
