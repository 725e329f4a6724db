"""Which configurations are refused, and how that is said: what would be served wrongly, or could not be."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.activations import ACT2FN

from common.model.demands import ACTIVATIONS
from common.model.loader import load_stage
from common.model.spec import load_spec
from dejavu.errors import ConfigurationError
from tests.unit.model.checkpoints import NUM_LAYERS, change_config, save_checkpoint
from tests.unit.model.generation import NUM_BLOCKS, assert_greedy, generate, make_stages


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.*gptq"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_parameters.*spiral"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.*longrope"),
        ({"rope_scaling": 2.0}, "rope_scaling"),
        ({"is_causal": False}, "is_causal"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"hidden_act": "wobble"}, "hidden_act 'wobble'.*silu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"num_attention_heads": 5, "head_dim": 32}, "num_key_value_heads is 2, which 5 heads"),
    ],
)
def test_what_would_be_served_wrongly_is_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigurationError, match=said):
        load_spec(tmp_path)


@pytest.mark.parametrize("name", ["bloom", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("field", ["head_dim", "num_key_value_heads"])
def test_heads_that_a_family_does_not_have_are_refused(name: str, field: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path)
    change_config(tmp_path, **{field: 2})
    with pytest.raises(ConfigurationError, match=rf"config\.json: {field} is 2, where a {name} "):
        load_spec(tmp_path)


@pytest.mark.parametrize(("num_slices", "is_served"), [(1, True), (2, False)])
def test_a_bloom_without_some_biases_is_refused(num_slices: int, is_served: bool, tmp_path: Path) -> None:
    save_checkpoint("bloom", tmp_path)
    change_config(tmp_path, slow_but_exact=True, pretraining_tp=num_slices)
    if is_served:
        load_spec(tmp_path)
        return
    with pytest.raises(ConfigurationError, match="slow_but_exact"):
        load_spec(tmp_path)


def test_every_activation_of_transformers_is_let_through() -> None:
    assert set(ACT2FN) <= set(ACTIVATIONS)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
def test_an_activation_is_judged_where_the_family_has_it(name: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path)
    change_config(tmp_path, hidden_act="wobble")
    load_spec(tmp_path)
    change_config(tmp_path, activation_function="wobble")
    if name == "bloom":
        load_spec(tmp_path)
        return
    with pytest.raises(ConfigurationError, match="activation_function 'wobble'"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", NUM_LAYERS + 1),
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("num_attention_heads", 0),
        ("num_key_value_heads", -2),
        ("head_dim", -8),
        ("hidden_size", 128.0),
        ("vocab_size", "many"),
        ("max_position_embeddings", -1),
    ],
)
def test_sizes_that_cannot_be_are_refused(field: str, value: object, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    change_config(tmp_path, **{field: value})
    with pytest.raises(ConfigurationError, match=r"config\.json: .*" + field.removeprefix("num_hidden_")):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"config\.json.*factor"),
        ({"tie_word_embeddings": "perhaps"}, r"config\.json.*tie_word_embeddings"),
    ],
)
def test_what_transformers_cannot_build_is_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigurationError, match=said):
        load_stage(load_spec(tmp_path), (0, 1))


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("qwen3", "head_dim"),
        ("mistral", "num_key_value_heads"),
        ("mixtral", "num_local_experts"),
        ("llama", "intermediate_size"),
        ("opt", "ffn_dim"),
    ],
)
def test_sizes_that_a_family_would_guess_must_be_said(name: str, field: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path)
    change_config(tmp_path, **{field: None})
    with pytest.raises(ConfigurationError, match=rf"config\.json: say {field}: "):
        load_spec(tmp_path)


def test_an_output_that_is_asked_for_as_a_tuple(tmp_path: Path) -> None:
    model = save_checkpoint("gpt2", tmp_path)
    change_config(tmp_path, return_dict=False)
    (sequence,) = generate(make_stages(load_spec(tmp_path), [2, 2], 16), [[5, 6, 7]], list(range(NUM_BLOCKS)), 16, 8)
    assert_greedy(model, sequence)
