"""The life of a stage's process: it works in one role, and when its pipeline is over, in the other.

Its weights stay. Its pool does not: others had been let in, and a new one is there in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.service import log_as, run_service
from common.stage.options import StageOptions
from common.stage.setup import load_stage_spec

if TYPE_CHECKING:
    from common.model.loader import StageModel
    from common.stage.service import StageService

_CLASSES = {"prompt_stage": "PromptStage", "token_stage": "TokenStage"}


@dataclass(slots=True)
class StageLife:
    """What outlives a role: the loaded layers, and how often the role has changed."""

    model: StageModel | None = None
    num_changes: int = 0


def run_stage(options: StageOptions) -> int:
    """Runs a stage, in whichever role its pipeline has, until SIGTERM; returns the exit code."""
    return run_service(options.name, lambda stop: _live(options, stop), options.cores)


async def _live(options: StageOptions, stop: asyncio.Event) -> None:
    life = StageLife()
    while await _serve(options, life, stop):
        options = options.in_other_role()
        life.num_changes += 1
        log_as(options.name)


async def _serve(options: StageOptions, life: StageLife, stop: asyncio.Event) -> bool:
    # by name: services do not know each other, and this package knows none of them
    module = importlib.import_module(f"services.{options.role}.service")
    service: StageService = getattr(module, _CLASSES[options.role])(options, load_stage_spec(options), life)
    return await service.serve(stop)
