"""What cannot start says why, at once, and exits with 1; nothing else is disturbed."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.cluster.system import ROOT, TINY, serve_command

pytestmark = pytest.mark.cluster


def refusal(*arguments: str) -> str:
    """What `dejavu serve` writes to stderr before it exits with 1."""
    done = subprocess.run(serve_command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("dejavu: error: "), done.stderr
    return done.stderr


def copy_of_tiny(folder: Path) -> Path:
    return Path(shutil.copytree(TINY, folder / "model"))


def test_no_such_model(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refusal("--port", "0", "--model", str(tmp_path / "none"))


def test_truncated_weights(tmp_path: Path) -> None:
    model = copy_of_tiny(tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refusal("--port", "0", "--model", str(model))


def test_weights_of_another_shape_are_refused_before_anything_is_started(tmp_path: Path) -> None:
    model = copy_of_tiny(tmp_path)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 4096', '"vocab_size": 5000'))
    message = refusal("--port", "0", "--model", str(model))
    said = "model.safetensors: model.embed_tokens.weight is [4096, 256], where config.json asks for [5000, 256]"
    assert message == f"dejavu: error: model: {model}/{said}\n"


def test_unsupported_architecture(tmp_path: Path) -> None:
    model = copy_of_tiny(tmp_path)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "mamba"'))
    message = refusal("--port", "0", "--model", str(model))
    assert "mamba" in message and "llama" in message


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        assert port in refusal("--port", port, "--state-dir", str(tmp_path))


def test_etcd_unreachable(tmp_path: Path) -> None:
    message = refusal("--port", "0", "--etcd", "http://127.0.0.1:9", "--state-dir", str(tmp_path))
    assert "http://127.0.0.1:9" in message


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--token-stages", "7"), "token_stages"),
        (("--prompt-split", "1,1"), "prompt_split"),
        (("--kv-memory", "1K"), "kv_memory"),
        (("--kv-memory", "90000G"), "kv_memory"),
        (("--threads-per-stage", "100000"), "threads_per_stage"),
        (("--device", "cuda"), "device"),
        (("--host", "192.0.2.1"), "host"),
        (("--etcd", "localhost:1"), "etcd"),
        (("--state-dir", "/dev/null/x"), "state_dir"),
    ],
)
def test_impossible_wishes_are_named(arguments: tuple[str, ...], field: str, tmp_path: Path) -> None:
    assert refusal("--port", "0", "--state-dir", str(tmp_path), *arguments).startswith(f"dejavu: error: {field}: ")


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "x"), ("config.json", "{"), ("config.json", "[]")])
def test_broken_files_are_named(file: str, content: str, tmp_path: Path) -> None:
    model = copy_of_tiny(tmp_path)
    (model / file).write_text(content)
    message = refusal("--port", "0", "--model", str(model))
    assert message.startswith("dejavu: error: model: ") and (file in message or "tokenizer" in message)


def test_missing_weights(tmp_path: Path) -> None:
    model = copy_of_tiny(tmp_path)
    (model / "model.safetensors").unlink()
    assert f"{model / 'model.safetensors'}: No such file" in refusal("--port", "0", "--model", str(model))


@pytest.mark.parametrize("arguments", [("--token-stages", "none"), ("--port", "65536"), ("--kv-memory", "much")])
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(serve_command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and arguments[0] in done.stderr
