"""Files of figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def event_loops(status: Mapping[str, Any]) -> dict[str, Any]:
    """How far each service's event loop was behind, by its name, as `dejavu status --json` says it."""
    return {service["name"]: service["loop"] for service in status["services"] if service.get("loop")}


def save(file: str | Path, figures: Mapping[str, Any]) -> None:
    """As JSON that people can read. Raises `OSError`."""
    Path(file).write_text(json.dumps(figures, indent=1) + "\n")


def load(file: str | Path) -> dict[str, Any]:
    """What was saved there. Raises `OSError` and `ValueError`."""
    figures: dict[str, Any] = json.loads(Path(file).read_text())
    return figures
