"""What a stage reads from a checkpoint, and which checkpoints are refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.model.loader import load_stage
from common.model.spec import ModelSpec, load_spec, split_layers
from dejavu.errors import ConfigurationError
from tests.unit.model.checkpoints import NUM_LAYERS, change_config, save_checkpoint
from tests.unit.model.generation import NUM_BLOCKS, assert_greedy, generate, make_stages

ONE_FILE = "100MB"


def keep_only(spec: ModelSpec, *wanted: str) -> None:
    """Deletes every shard that holds none of the wanted tensors."""
    files = {file for key, file in spec.keys.items() if any(part in key for part in wanted)}
    assert files < set(spec.keys.values())
    for file in set(spec.keys.values()) - files:
        (spec.model_dir / file).unlink()


@pytest.mark.parametrize(
    ("name", "layers", "wanted"),
    [
        ("llama", (0, 1), (".layers.0.", "embed_tokens")),
        ("llama", (2, 3), (".layers.2.",)),
        ("llama", (3, 4), (".layers.3.", "model.norm", "lm_head")),
        ("llama-tied", (3, 4), (".layers.3.", "model.norm", "embed_tokens")),
        ("mixtral", (1, 2), (".layers.1.",)),
        ("gpt2", (2, 3), (".h.2.",)),
        ("opt", (3, 4), (".layers.3.", "decoder.final_layer_norm", "embed_tokens")),
    ],
)
def test_a_stage_reads_only_its_own_tensors(
    name: str, layers: tuple[int, int], wanted: tuple[str, ...], tmp_path: Path
) -> None:
    save_checkpoint(name, tmp_path, "1KB")
    spec = load_spec(tmp_path)
    keep_only(spec, *wanted)
    load_stage(spec, layers)


def test_keys_of_a_bare_base_model(tmp_path: Path) -> None:
    model = save_checkpoint("gpt2", tmp_path, ONE_FILE)
    file = tmp_path / "model.safetensors"
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    stages = make_stages(load_spec(tmp_path), [2, 2], 16)
    (sequence,) = generate(stages, [[5, 6, 7]], list(range(NUM_BLOCKS)), 16, 8)
    assert_greedy(model, sequence)


def test_what_a_spec_says(tmp_path: Path) -> None:
    save_checkpoint("qwen3", tmp_path)
    spec = load_spec(tmp_path)
    assert (spec.architecture, spec.num_layers, spec.num_kv_heads, spec.head_dim) == ("qwen3", NUM_LAYERS, 2, 64)
    assert (spec.vocab_size, spec.max_context_tokens, spec.hidden_size) == (128, 256, 128)
    assert (spec.dtype, spec.eos_token_ids, spec.name) == ("float32", (2,), tmp_path.name)
    assert load_spec(tmp_path, "bfloat16").dtype == "bfloat16"


@pytest.mark.parametrize(
    "generation", [None, {}, {"eos_token_id": None}, {"eos_token_id": 7}, {"eos_token_id": [7, 8]}]
)
@pytest.mark.parametrize("config", [{}, {"eos_token_id": None}, {"eos_token_id": 5}, {"eos_token_id": [5, 6]}])
def test_a_text_ends_where_transformers_ends_it(
    config: dict[str, object], generation: dict[str, object] | None, tmp_path: Path
) -> None:
    save_checkpoint("llama", tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(written | config))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    expected_ids = expected if isinstance(expected, list) else [] if expected is None else [expected]
    assert load_spec(tmp_path).eos_token_ids == tuple(expected_ids)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", ["</s>", True, [2, "3"], 2.0])
def test_ends_that_are_no_token_ids_are_named(eos: object, name: str, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    if name == "config.json":
        (tmp_path / "generation_config.json").unlink()
    document = json.loads((tmp_path / name).read_text())
    (tmp_path / name).write_text(json.dumps(document | {"eos_token_id": eos}))
    with pytest.raises(ConfigurationError, match=rf"/{name}: eos_token_id"):
        load_spec(tmp_path)


def test_a_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    for name in ("llama", "llama-tied"):
        save_checkpoint(name, tmp_path / name)
    save_checkpoint("llama", tmp_path / "again")
    llama, tied, again = (load_spec(tmp_path / name).fingerprint for name in ("llama", "llama-tied", "again"))
    assert llama == again != tied


def test_a_spec_needs_no_torch() -> None:
    code = "import sys, common.model.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not a directory"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        load_spec(tmp_path)
    save_checkpoint("llama", tmp_path, ONE_FILE)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        load_spec(tmp_path)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: whole[:5], lambda whole: b"\xff" * 64])
def test_damaged_files_are_named(damage: object, tmp_path: Path) -> None:
    assert callable(damage)
    save_checkpoint("llama", tmp_path, ONE_FILE)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 8]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [-4, 4]},
        {"data_offsets": ["x", 4]},
        {"data_offsets": None},
        {"dtype": "F16"},
        {"dtype": []},
        {"shape": [3]},
        {"shape": "many"},
        {"shape": [-2, -2]},
    ],
    ids=str,
)
def test_a_header_that_contradicts_itself_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path, ONE_FILE)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header["model.norm.weight"] |= change
    written = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(written)) + written + whole[8 + length :])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is no complete safetensors file"):
        load_spec(tmp_path)


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    spec = load_spec(tmp_path)
    lost = spec.keys["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / lost).unlink()
    with pytest.raises(ConfigurationError, match=lost):
        load_stage(spec, (0, 2))
    with pytest.raises(ConfigurationError, match=lost):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    ("name", "ending", "said"),
    [
        ("llama", "layers.1.mlp.up_proj.weight", r"layers\.1\.mlp\.up_proj"),
        ("llama", "lm_head.weight", "lm_head"),
        ("llama-tied", "embed_tokens.weight", "embed_tokens"),
        ("mixtral", "layers.2.block_sparse_moe.experts.1.w3.weight", "w3"),
    ],
)
def test_missing_tensors_are_named(name: str, ending: str, said: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path, ONE_FILE)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (missing,) = (key for key in tensors if key.endswith(ending))
    del tensors[missing]
    save_file(tensors, file)
    with pytest.raises(ConfigurationError, match=said):
        load_stage(load_spec(tmp_path), (1, NUM_LAYERS))


def test_tensors_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path, ONE_FILE)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(5, 7)
    save_file(tensors, file)
    said = (
        r"model\.safetensors: model\.layers\.0\.mlp\.up_proj\.weight is \[5, 7\], .*config\.json asks for \[96, 128\]"
    )
    with pytest.raises(ConfigurationError, match=said):
        load_spec(tmp_path)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mamba"'))
    with pytest.raises(ConfigurationError, match="supported are .*llama"):
        load_spec(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path, ONE_FILE)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigurationError, match=rf"{name} is no file"):
        load_spec(tmp_path)


def test_json_without_bottom_is_refused(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path, ONE_FILE)
    deep = "[" * 100_000
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep.encode())
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        load_spec(tmp_path)
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(ConfigurationError, match=r"config\.json is no JSON"):
        load_spec(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path, ONE_FILE)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors: .*up_proj.*quantised"):
        load_spec(tmp_path)


def test_the_name_that_bloom_had_for_its_hidden_size(tmp_path: Path) -> None:
    save_checkpoint("bloom", tmp_path)
    change_config(tmp_path, hidden_size=None, n_embed=64)
    spec = load_spec(tmp_path)
    assert (spec.hidden_size, spec.head_dim) == (64, 16)
    load_stage(spec, (0, 1))


def test_one_file_counts_before_an_index_beside_it(tmp_path: Path) -> None:
    """So has transformers it; the shards may be there still, or gone."""
    save_checkpoint("llama", tmp_path)
    model = save_checkpoint("qwen3", tmp_path / "other", ONE_FILE)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "other" / name).rename(tmp_path / name)
    for shard in (*sorted(tmp_path.glob("model-*.safetensors"))[:1], None):
        stages = make_stages(load_spec(tmp_path), [4], 16)
        (sequence,) = generate(stages, [[5, 6, 7]], list(range(NUM_BLOCKS)), 16, 8)
        assert_greedy(model, sequence)
        if shard is not None:
            shard.unlink()


def test_an_index_without_a_map_is_named(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": []}')
    with pytest.raises(ConfigurationError, match=r"index\.json"):
        load_spec(tmp_path)


def test_an_index_cannot_leave_the_directory(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ConfigurationError, match="leaves the directory"):
        load_spec(tmp_path)


@pytest.mark.parametrize(("num_stages", "counts"), [(5, None), (0, None), (2, [1, 1]), (2, [4, 0]), (2, [4])])
def test_impossible_splits_are_refused(num_stages: int, counts: list[int] | None) -> None:
    with pytest.raises(ConfigurationError):
        split_layers(NUM_LAYERS, num_stages, counts)


def test_splits() -> None:
    assert split_layers(7, 3) == [(0, 3), (3, 5), (5, 7)]
    assert split_layers(7, 2, [1, 6]) == [(0, 1), (1, 7)]
