"""The table of what checkpoints hold says what transformers' own modules say, for every family."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig, Qwen2Config

from common.model.headers import StoredTensor
from common.model.names import PREFIXES
from common.model.shapes import check_tensors
from common.model.spec import load_spec, sizes_of
from dejavu.errors import ConfigurationError
from tests.unit.model.checkpoints import CONFIGS, change_config, save_checkpoint

_SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
VARIANTS: dict[str, Any] = {
    "llama-biases": LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "gpt2-inner": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_inner=40),
    "gpt2-untied": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, tie_word_embeddings=False),
    "gpt_neox-no-bias": GPTNeoXConfig(**_SMALL, intermediate_size=80, attention_bias=False),
    "opt-no-bias": OPTConfig(**_SMALL, ffn_dim=80, enable_bias=False, layer_norm_elementwise_affine=False),
    "qwen2-tied": Qwen2Config(**_SMALL, intermediate_size=80, num_key_value_heads=2, tie_word_embeddings=True),
}


def parameters(config: Any) -> dict[str, StoredTensor]:
    """Those of transformers' modules, as if a file held them under the same names."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: StoredTensor("f", "F32", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def check(config: Any, stored: dict[str, StoredTensor]) -> None:
    document = config.to_dict()
    check_tensors(config.model_type, document, sizes_of(document, Path("config.json")), stored, Path())


@pytest.mark.parametrize("name", [*CONFIGS, *VARIANTS])
def test_every_parameter_is_known_with_its_shape(name: str) -> None:
    config = (CONFIGS | VARIANTS)[name]
    stored = parameters(config)
    check(config, stored)
    for key, tensor in stored.items():
        for axis in range(len(tensor.shape)):
            shape = list(tensor.shape)
            shape[axis] += 1
            other = stored | {key: StoredTensor("f", "F32", tuple(shape))}
            with pytest.raises(ConfigurationError, match=re.escape(f"{key} is {shape}, where config.json asks for ")):
                check(config, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_there_always_is_missed(name: str) -> None:
    stored = parameters(CONFIGS[name])
    prefix = f"{PREFIXES[CONFIGS[name].model_type]}."
    missed = 0
    for key in stored:
        rest = {other: tensor for other, tensor in stored.items() if other != key}
        try:
            check(CONFIGS[name], rest)
        except ConfigurationError as error:
            assert f"no safetensors file has {key.removeprefix(prefix)}" in str(error)
            missed += 1
    assert missed >= len(stored) // 3


@pytest.mark.parametrize(
    ("name", "field", "tensor"),
    [
        ("llama", "hidden_size", "embed_tokens"),
        ("llama", "intermediate_size", "mlp"),
        ("llama", "num_key_value_heads", "k_proj"),
        ("qwen3", "head_dim", "self_attn"),
        ("mixtral", "num_local_experts", "gate"),
        ("gpt2", "n_positions", "wpe"),
        ("opt", "ffn_dim", "fc"),
        ("opt", "max_position_embeddings", "embed_positions"),
        ("opt-projected", "word_embed_proj_dim", "decoder"),
        ("bloom", "vocab_size", "word_embeddings"),
        ("gpt_neox", "intermediate_size", "dense_"),
    ],
)
def test_a_config_of_another_model_is_refused(name: str, field: str, tensor: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {field: 2 * config[field]}))
    with pytest.raises(ConfigurationError, match=rf"\.safetensors: .*{tensor}.* where config\.json asks for "):
        load_spec(tmp_path)


def test_embeddings_of_another_width_than_a_config_has_by_default_are_refused(tmp_path: Path) -> None:
    save_checkpoint("opt-projected", tmp_path)
    change_config(tmp_path, word_embed_proj_dim=None)
    with pytest.raises(ConfigurationError, match=r"embed_tokens\.weight is \[128, 32\], where .* for \[128, 128\]"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("name", "flag", "missing"),
    [
        ("llama", "attention_bias", "self_attn.q_proj.bias"),
        ("llama", "mlp_bias", "mlp.gate_proj.bias"),
        ("qwen3", "attention_bias", "self_attn.q_proj.bias"),
        ("mistral", "attention_bias", None),
    ],
)
def test_biases_that_the_config_asks_for_are_missed(name: str, flag: str, missing: str | None, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path)
    change_config(tmp_path, **{flag: True})
    if missing is None:  # the flag means nothing to the family
        load_spec(tmp_path)
        return
    with pytest.raises(ConfigurationError, match=re.escape(f"no safetensors file has layers.0.{missing}")):
        load_spec(tmp_path)
