"""`python -m services.prompt_stage`: layers [a, b) of a prompt pipeline; stage 0 drives it."""

from __future__ import annotations

import sys

from common.service import run_service
from common.stage.options import parse_stage_options
from common.stage.setup import load_stage_spec
from services.prompt_stage.service import PromptStage


def main(argv: list[str] | None = None) -> int:
    """Runs a prompt stage until SIGTERM; returns the exit code."""
    options = parse_stage_options("prompt_stage", __doc__, argv)
    return run_service(
        options.name, lambda stop: PromptStage(options, load_stage_spec(options)).serve(stop), options.cores
    )


if __name__ == "__main__":
    sys.exit(main())
