"""`dejavu serve`: hands over to the launcher of the checkout that this package lies in."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


def serve(arguments: Sequence[str], root: Path = CHECKOUT) -> int:
    """Runs `deploy.serve` of the checkout at `root` with untouched arguments; returns its exit code."""
    if not (root / "deploy" / "serve.py").is_file() or not (root / "services").is_dir():
        print(
            "dejavu: error: `serve` needs a checkout of the project: this installation has the client only. "
            "Clone the repository and run `make serve` there",
            file=sys.stderr,
        )
        return 1
    sys.path.insert(0, str(root))
    # by name: the wheel has no such module, and the client must not depend on it
    code: int = importlib.import_module("deploy.serve").main(list(arguments))
    return code
