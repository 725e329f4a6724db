"""The life of a stage's process: it works in one role, and when its pipeline is over, in the other.

Its weights stay. Its pool does not: others had been let in, and a new one is there in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from common.model.spec import ModelSpec
from common.process import later_incarnation, own_incarnation
from common.service import log_as, run_service
from common.stage.options import StageOptions
from common.stage.process import StageProcess
from common.stage.setup import load_stage_spec

if TYPE_CHECKING:
    from common.model.loader import StageModel
    from common.stage.service import StageService

StageRoles: TypeAlias = "Mapping[str, Callable[[StageOptions, ModelSpec, str, StageProcess], StageService]]"
"""What a stage is in each role. Only the entry points of the two services know both."""


def run_stage(options: StageOptions, roles: StageRoles) -> int:
    """Runs a stage, in whichever role its pipeline has, until SIGTERM; returns the exit code."""
    return run_service(options.name, lambda stop: _live(options, roles, stop), options.cores)


async def _live(options: StageOptions, roles: StageRoles, stop: asyncio.Event) -> None:
    model: StageModel | None = None
    for num_changes in itertools.count():
        process = StageProcess(stop, model)
        incarnation = later_incarnation(own_incarnation(), num_changes)
        stage = roles[options.role](options, load_stage_spec(options), incarnation, process)
        if not await process.serve(stage):
            return
        options, model = options.in_other_role(), process.model
        log_as(options.name)
