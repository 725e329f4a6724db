"""`python -m services.token_stage`: layers [a, b) of a token pipeline; stage 0 drives it."""

from __future__ import annotations

import sys

from common.stage.life import run_stage
from common.stage.options import parse_stage_options
from services.prompt_stage.service import PromptStage
from services.token_stage.service import TokenStage


def main(argv: list[str] | None = None) -> int:
    """Runs a token stage until SIGTERM; returns the exit code."""
    # its pipeline may change its role
    roles = {"prompt_stage": PromptStage, "token_stage": TokenStage}
    return run_stage(parse_stage_options("token_stage", __doc__, argv), roles)


if __name__ == "__main__":
    sys.exit(main())
