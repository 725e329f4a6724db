from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
LIBRARY = ROOT / "common" / "kv"


def test_the_example_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "dejavulib.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sent 204800 bytes over ['shm'], error: None" in done.stderr
    assert "intact: True" in done.stdout and "intact: False" not in done.stdout


def test_the_library_stands_alone() -> None:
    allowed = {"torch", "numpy", "msgspec", "zmq", "dejavu.errors", "common.kv", "common.keys", "common.c_library"}
    for path in LIBRARY.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                is_standard = name.partition(".")[0] in sys.stdlib_module_names
                assert is_standard or any(name == one or name.startswith(f"{one}.") for one in allowed), (
                    f"{path.name} imports {name}"
                )


def test_types_are_prepared_before_threads_decode_them() -> None:
    """Two threads that are the first to decode a type crash the process: decoders are made when modules are loaded."""
    for path in LIBRARY.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                late = [call.lineno for call in calls if makes_a_decoder(call)]
                assert not late, f"{path.name}, lines {late}"


def makes_a_decoder(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    return name == "Decoder" or (name == "decode" and any(word.arg == "type" for word in call.keywords))


def test_decisions_need_no_torch() -> None:
    script = (
        "import sys, common.kv.layout, common.kv.blocks, common.kv.geometry\n"
        "assert not {'torch', 'zmq'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
