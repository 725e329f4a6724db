"""The baseline: transformers' own static-batch `generate`, in a process of its own, on all cores or on the GPU.

Both of its cache modes are measured (growing and preallocated); the faster one counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from loadtest.workload import Workload

MODES = ("dynamic", "static")


def measure_baseline(model: str, dtype: str, device: str, workload: Workload, vocab_size: int) -> dict[str, Any]:
    """Output tokens per second of each mode, and the best; `device` as `dejavu serve` takes it."""
    items = [[list(item.prompt), item.max_tokens] for item in workload.rotated(7, vocab_size).items]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "work.json")
        file.write_text(json.dumps(items))
        modes: dict[str, Any] = {}
        for mode in MODES:
            command = [sys.executable, "-m", "loadtest.baseline", model, dtype, device, mode, str(file)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            modes[mode] = json.loads(done.stdout.splitlines()[-1])
            print(f"baseline {mode}: {modes[mode]}", flush=True)
    best = max(MODES, key=lambda mode: modes[mode]["output_tokens_per_s"])
    return {"what": "transformers generate, one static batch", "modes": modes, "best": best, **modes[best]}


def _generate(model: str, dtype: str, device: str, mode: str, file: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    items = json.loads(Path(file).read_text())
    width = max(len(prompt) for prompt, _ in items)
    num_output = max(count for _, count in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(items):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=wanted).eval().to(device)
    options: dict[str, Any] = {"cache_implementation": "static"} if mode == "static" else {}

    def run(batch: int, count: int) -> float:
        started_s = time.monotonic()
        with torch.inference_mode():
            output = loaded.generate(
                input_ids=ids[:batch], attention_mask=mask[:batch], max_new_tokens=count, min_new_tokens=count,
                do_sample=False, pad_token_id=0, eos_token_id=None, **options,
            )  # fmt: skip
            output.cpu()  # a GPU is waited for
        return time.monotonic() - started_s

    run(4, 4)
    walls = [run(len(items), num_output) for _ in range(2)]
    useful = sum(count for _, count in items)
    return {
        "device": device,
        "walls_s": [round(w, 3) for w in walls],
        "output_tokens_per_s": round(useful / min(walls), 1),
    }


def _main() -> int:
    parser = argparse.ArgumentParser("loadtest.baseline")
    for name in ("model", "dtype", "device", "mode", "file"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    print(json.dumps(_generate(**vars(arguments))))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
