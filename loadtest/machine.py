"""Where figures were taken: machine, versions, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "pyzmq", "uvloop", "msgspec", "nixl-cu13")


def describe_machine() -> dict[str, Any]:
    """Facts that belong to every figure."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        "",
    )
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "cpu": model or platform.processor(),
        "num_cores": os.cpu_count(),
        "memory_bytes": int(memory) * 1024,
        "gpus": _gpus(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "versions": versions,
        "command": ["python", "-m", _module_name(), *sys.argv[1:]],
        "time": time.strftime("%FT%TZ", time.gmtime()),
    }


def cpu_clock_jumps_ms(duration_s: float) -> list[float]:
    """By how much this thread's CPU clock jumped while it did nothing but read it (jumps over 5 ms): on a virtual
    machine the clock goes on while the host has taken the core away. CPU times can be too large by as much."""
    jumps: list[float] = []
    end_s, last_s = time.monotonic() + duration_s, time.thread_time()
    while time.monotonic() < end_s:
        now_s = time.thread_time()
        if now_s - last_s > 0.005:
            jumps.append(round(1e3 * (now_s - last_s), 1))
        last_s = now_s
    return jumps


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else str(spec.name)


def _gpus() -> list[str]:
    """Name, driver and memory of each, as far as the driver's own program tells."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return told.stdout.splitlines()


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
