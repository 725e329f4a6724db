"""The life of a stage's process: it works in one role, and when its pipeline is over, in the other.

Its weights stay. Its pool does not: others had been let in, and a new one is there in a fraction of a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from common.model.spec import ModelSpec
from common.service import log_as, run_service
from common.stage.options import StageOptions
from common.stage.setup import load_stage_spec

if TYPE_CHECKING:
    from common.model.loader import StageModel
    from common.stage.service import StageService

StageRoles: TypeAlias = "Mapping[str, Callable[[StageOptions, ModelSpec, StageLife], StageService]]"
"""What a stage is in each role. Only the entry points of the two services know both."""


@dataclass(slots=True)
class StageLife:
    """What outlives a role: the loaded layers, and how often the role has changed."""

    model: StageModel | None = None
    num_changes: int = 0


def run_stage(options: StageOptions, roles: StageRoles) -> int:
    """Runs a stage, in whichever role its pipeline has, until SIGTERM; returns the exit code."""
    return run_service(options.name, lambda stop: _live(options, roles, stop), options.cores)


async def _live(options: StageOptions, roles: StageRoles, stop: asyncio.Event) -> None:
    life = StageLife()
    while await roles[options.role](options, load_stage_spec(options), life).serve(stop):
        options = options.in_other_role()
        life.num_changes += 1
        log_as(options.name)
