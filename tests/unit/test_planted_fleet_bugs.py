"""The simulation of several pipelines finds what it is there to find."""

from __future__ import annotations

from typing import Any

import pytest

from common.stage.driver import Driver
from common.stage.repeats import PullRequests
from services.cache_store.shelf import Shelf
from services.prompt_stage.scheduler import PromptScheduler
from services.router.dispatch import Dispatch
from services.router.ledger import Choice, Request
from services.token_stage.driver import TokenDriver
from services.token_stage.patience import Patience
from services.token_stage.prompt_pipelines import PromptPipelines
from services.token_stage.replication import Replication
from tests.unit import test_fleet
from tests.unit.planting import Bug, around, instead

FLEET = test_fleet.simulate


def lossy_fleet(seed: int) -> object:
    return test_fleet.simulate(seed, loss=0.05)


def lossy_fleet_of_stages(seed: int) -> object:
    """What a pipeline's only stage is told does not leave its process, and is not lost."""
    return test_fleet.simulate(seed, loss=0.05, is_cut=True)


def keeps_its_epoch(old: Any, self: Dispatch, request: Request, choice: Choice, *where: Any) -> None:
    """Whoever was somewhere before is thought to be in that epoch still."""
    epoch = choice.epoch
    old(self, request, choice, *where)
    choice.epoch = epoch or choice.epoch


def stays_loaded(old: Any, self: Dispatch, choice: Choice) -> None:
    """A pipeline that a sequence leaves is thought to be busy with it for ever."""
    before = {name: view.load_tokens for name, view in self.pipelines.items()}
    was = choice.pipeline
    old(self, choice)
    if was in before and not choice.is_done:
        self.pipelines[was].load_tokens = before[was]


def asks_who_is_over(self: PromptPipelines, wanted: str, records: Any) -> Any:
    prompts = [record for record in records.values() if record.role == "prompt_stage"]
    return next((record for record in prompts if record.pipeline == wanted), next(iter(prompts), None))


BUGS = [
    Bug("who moves keeps its old epoch", FLEET, around(Dispatch, "_give", keeps_its_epoch), 1),
    Bug("blocks that nobody asks for are kept", FLEET, instead(TokenDriver, "_end_orphans", lambda *args: None), 21),
    Bug("the load of a pipeline stays when its sequences leave", FLEET, around(Dispatch, "unload", stays_loaded), 1),
    Bug("a prompt pipeline that is over is asked", FLEET, instead(PromptPipelines, "pick", asks_who_is_over), 29),
    Bug(
        "a pipeline that a sequence has left deletes its copy",
        FLEET,
        instead(Shelf, "ended", lambda self, pipeline, key: self.forget(key)),
        386,
    ),
    Bug(
        "a claim that went nowhere is not repeated",
        FLEET,
        instead(Replication, "writer_is_back", lambda *args: None),
        70,
    ),
    Bug(
        "a hand-off that does not end is not asked about",
        lossy_fleet,
        instead(Patience, "awaited", lambda self: {}),
    ),
    Bug(
        "a pull that went nowhere is not repeated",
        lossy_fleet_of_stages,
        instead(PullRequests, "unanswered", lambda self: []),
    ),
    Bug(
        "nobody asks whether a prompt was let go",
        lossy_fleet_of_stages,
        instead(PromptScheduler, "not_let_go", lambda *args: []),
    ),
    Bug("that a pipeline is ready is said once", lossy_fleet, instead(Driver, "is_whole", False), 31),
    Bug("a router does not ask after quiet sequences", lossy_fleet, instead(Dispatch, "ask_again", lambda *args: None)),
    Bug(
        "what a pipeline has lost sight of is given up",
        lossy_fleet,
        instead(Dispatch, "sequences_unknown", lambda *args: None),
    ),
    Bug("KV is waited for for ever", lossy_fleet, instead(Patience, "give_up_stalled", lambda *args: [])),
]


@pytest.mark.parametrize("bug", BUGS, ids=Bug.id_of)
def test_a_planted_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.must_be_found(monkeypatch)
