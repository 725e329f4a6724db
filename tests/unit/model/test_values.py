"""Values of the wrong type are refused before anything is started: by the table, which is held against transformers."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest

from common.model.names import PREFIXES
from common.model.spec import load_spec
from common.model.values import kinds_of
from dejavu.errors import ConfigurationError
from tests.unit.model.checkpoints import CONFIGS, change_config, save_checkpoint

_KINDS = {
    frozenset({int}): "whole",
    frozenset({bool}): "flag",
    frozenset({str}): "text",
    frozenset({float}): "real",
    frozenset({int, float}): "number",
}
_ELSEWHERE = {"dtype", "transformers_version", "summary_type", "summary_activation"}
"""Checked elsewhere, or of no consequence."""


def kinds_of_transformers(family: str) -> set[tuple[str, str, bool]]:
    """The fields of simple types of a family's configuration."""
    config = type(next(config for config in CONFIGS.values() if config.model_type == family))
    found = set()
    for field in dataclasses.fields(config):  # those that it takes over from its base are not checked there either
        members = set(typing.get_args(field.type)) or {field.type}
        kind = _KINDS.get(frozenset(members - {type(None)}))
        if kind is not None:
            found.add((field.name, kind, type(None) in members))
    return found


@pytest.mark.parametrize("family", PREFIXES)
def test_the_table_says_what_transformers_says(family: str) -> None:
    theirs = {entry for entry in kinds_of_transformers(family) if entry[0] not in _ELSEWHERE}
    ours = set(kinds_of(family))
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"rms_norm_eps": "x"}, "rms_norm_eps is 'x', where llama needs a number with a decimal point"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ("llama", {"num_attention_heads": "8"}, "num_attention_heads is '8', where llama needs a whole number"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window is 'no', where qwen2 needs true or false"),
        ("mixtral", {"num_experts_per_tok": 2.0}, "num_experts_per_tok is 2.0"),
        ("gpt_neox", {"use_parallel_residual": 1}, "use_parallel_residual is 1"),
        ("gpt2", {"layer_norm_epsilon": []}, "layer_norm_epsilon is \\[\\]"),
        ("opt", {"do_layer_norm_before": "x"}, "do_layer_norm_before is 'x'"),
        ("bloom", {"apply_residual_connection_post_layernorm": {}}, "apply_residual_connection_post_layernorm"),
    ],
)
def test_a_value_of_another_type_is_named(name: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigurationError, match=r"config\.json: " + said):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "linear"}, "rope_scaling: type 'linear' needs factor"),
        ({"type": "yarn"}, "rope_scaling: type 'yarn' needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_scaling: type 'llama3' needs low_freq_factor"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling: factor is '2', no number above 0"),
        ({"rope_type": "linear", "factor": 0}, "rope_scaling: factor is 0, no number above 0"),
        ({"rope_theta": None}, "rope_scaling: rope_theta is None"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}, "rope_scaling: beta_fast is 'x', no number"),
        ({"full_attention": {"rope_type": "default"}}, "rope_scaling: full_attention"),
    ],
)
def test_incomplete_rope_is_named(rope: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    change_config(tmp_path, rope_scaling=rope)
    with pytest.raises(ConfigurationError, match=r"config\.json: " + said):
        load_spec(tmp_path)


def test_what_need_not_be_said_may_be_null(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    change_config(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_fast": None})
    load_spec(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2}, "6 heads cannot share the hidden size of 128"),
        ("gpt_neox", {"num_attention_heads": 5}, "5 heads cannot share the hidden size of 128"),
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers, num_hidden_layers is 4"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}, "layer_types is .*supported is a list of full_attention"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0: say null for none"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, of num_local_experts 4"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0, of num_local_experts 4"),
    ],
)
def test_numbers_that_do_not_fit_each_other_are_named(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save_checkpoint(name, tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigurationError, match=r"config\.json: " + said):
        load_spec(tmp_path)
