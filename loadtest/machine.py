"""Where figures were taken: machine, versions, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "pyzmq", "uvloop", "msgspec")


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
        "python": platform.python_version(),
        "kernel": platform.release(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "versions": versions,
        "command": ["python", "-m", *sys.argv],
        "time": time.strftime("%FT%TZ", time.gmtime()),
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
