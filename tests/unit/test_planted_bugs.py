"""The simulations find what they are there to find: each bug that is planted here into what we ship is noticed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from common.etcd.client import is_absent
from common.etcd.election import Election
from common.etcd.lease import Lease
from common.membership import GONE, Membership, Roster
from common.messages import TokensProduced
from services.cache_store.shelf import Shelf
from services.router import cluster, requests
from services.router.ledger import Ledger, new_request
from services.router.pipelines import missing_pipelines
from services.router.requests import Requests
from services.router.watchdog import TICK_S, Watchdog
from services.token_stage.admissions import Admissions
from services.token_stage.audience import Audience
from services.token_stage.intake import Intake
from services.token_stage.replication import Replication
from services.token_stage.sequence import Sequence
from services.token_stage.table import SequenceTable
from tests.unit import test_cluster_simulation, test_prompt_recovery, test_replication, test_whole_system
from tests.unit.planting import Bug, Patch, around, instead

STORES = test_replication.simulate
FORSAKEN = test_replication.forsake
PROMPTS = test_prompt_recovery.simulate
WHOLE = test_whole_system.simulate
CLUSTER = test_cluster_simulation.simulate
REPLACEMENT = test_cluster_simulation.replace_in_time
REPLACED = test_cluster_simulation.wake_up_replaced
DEPOSED = test_cluster_simulation.wake_up_deposed


def touched_only_by(*names: str) -> Callable[[Patch], None]:
    """Whoever else touches a sequence's blocks is not waited for."""
    return instead(Sequence, "is_touched", property(lambda self: any(getattr(self, name) for name in names)))


def whole_watermark(old: Any, self: Replication, name: str, batch: int, failed: list[str]) -> Any:
    """What was computed while a store was reading counts as read."""
    store = self._stores.get(name)
    if store is not None and store.reading:
        store.reading = {key: (s, s.num_computed, len(s.tokens)) for key, (s, _, _) in store.reading.items()}
    return old(self, name, batch, failed)


def never_tried_again(old: Any, self: Replication, name: str, batch: int, failed: list[str]) -> Any:
    """Once refused, always thought to be refused."""
    refused = dict(self._stores[name].refused) if name in self._stores else {}
    read = old(self, name, batch, failed)
    if name in self._stores:
        self._stores[name].refused |= refused
    return read


def any_answer_counts(old: Any, self: Replication, name: str, batch: int, failed: list[str]) -> Any:
    store = self._stores.get(name)
    return old(self, name, batch if store is None else store.batch, failed)


def first_pull_counts_for_all(old: Any, self: Intake, sequence_id: str, attempt: int, intact: bool) -> Any:
    sequence = self._table.sequences.get(sequence_id)
    if sequence is not None and sequence.attempt == attempt and sequence.num_pulls:
        sequence.num_pulls = 1
    return old(self, sequence_id, attempt, intact)


def old_epochs_are_heard(old: Any, self: Requests, produced: TokensProduced) -> None:
    for token in produced.tokens:
        entry = self.ledger.sequence(token.sequence_id)
        if entry is not None:
            entry[1].epoch, entry[1].pipeline = produced.epoch, produced.pipeline
    old(self, produced)


def repetitions_count(old: Any, self: Ledger, token: Any, epoch: int) -> Any:
    _, choice = self._sequences[token.sequence_id]
    if not choice.is_done:
        token = msgspec.structs.replace(token, index=len(choice.delivered))
    return old(self, token, epoch)


def not_made_ready(old: Any, self: Admissions, *args: Any) -> Any:
    adopted = old(self, *args)
    if adopted is not None:
        self._table.ready.pop(adopted[0], None)
    return adopted


async def long_held(old: Any, self: Lease) -> None:
    await old(self)
    self._held_since_s = -math.inf


def as_if_never_paused(old: Any, self: Watchdog, members: Any, now_s: float) -> Any:
    if self._ticked_at_s is None:
        self._ticked_at_s = now_s - TICK_S
    return old(self, members, now_s)


async def always_confirmed(self: Membership, limit_s: float) -> bool:
    return True


def without_delivered(*args: Any) -> Any:
    return new_request(*(*args[:6], [], *args[7:]))


BUGS = [
    Bug("a step's blocks are given away", STORES, touched_only_by("num_reads", "num_pulls", "awaits_writers")),
    Bug(
        "blocks that a store reads are given away",
        STORES,
        touched_only_by("num_in_flight", "num_pulls", "awaits_writers"),
    ),
    Bug(
        "blocks that replicas are copied into are given away",
        STORES,
        touched_only_by("num_in_flight", "num_reads", "awaits_writers"),
    ),
    Bug(
        "blocks that prompt stages write into are given away",
        PROMPTS,
        touched_only_by("num_in_flight", "num_reads", "num_pulls"),
    ),
    Bug("nobody waits for claims", STORES, instead(Replication, "is_settled", property(lambda self: True))),
    Bug(
        "the last delivered token is drawn again",
        STORES,
        around(
            Admissions,
            "admit",
            lambda old, self, i, c, prompt, forced, *more: old(self, i, c, prompt, forced[:-1], *more),
        ),
    ),
    Bug(
        "what the dead router had not passed on is forgotten",
        WHOLE,
        around(Sequence, "frames_after", lambda old, self, *args: None if old(self, *args) is None else []),
    ),
    Bug("a stale watermark is trusted", STORES, around(Replication, "replicated", whole_watermark)),
    Bug(
        "what a store has refused counts as kept",
        STORES,
        around(Replication, "replicated", lambda old, self, name, batch, failed: old(self, name, batch, [])),
    ),
    Bug(
        "what a store read after it was given up counts",
        FORSAKEN,
        instead(Shelf, "_void", lambda self, pipeline, batch: self._batches.pop(pipeline)),
    ),
    Bug(
        "what a store read after it was given up counts in the next epoch",
        FORSAKEN,
        instead(Shelf, "_is_doubtful", lambda self, batch: False),
    ),
    Bug("a store that was given up is heard", FORSAKEN, around(Replication, "replicated", any_answer_counts)),
    Bug("a refusal is remembered for ever", STORES, around(Replication, "replicated", never_tried_again), 40),
    Bug("the first stage's copy counts for all", STORES, around(Intake, "pulled", first_pull_counts_for_all)),
    Bug(
        "a damaged copy is used",
        STORES,
        around(Intake, "pulled", lambda old, self, i, attempt, intact: old(self, i, attempt, True)),
    ),
    Bug("tokens are shown before they are safe", STORES, instead(SequenceTable, "_may_deliver", lambda *args: True)),
    Bug(
        "one token more than allowed may be unsafe",
        PROMPTS,
        around(
            Replication,
            "protects",
            lambda old, self, s, position, lag, *, is_strict=False: old(
                self, s, position, lag + 1, is_strict=is_strict
            ),
        ),
    ),
    Bug("who has lost its router goes on", STORES, instead(Admissions, "orphan", lambda *args: None)),
    Bug("who has lost its router is kept for ever", WHOLE, instead(Admissions, "orphans", lambda self: [])),
    Bug("who was taken over does not go on", WHOLE, around(Admissions, "adopt", not_made_ready)),
    Bug("nothing can be cancelled", WHOLE, instead(Admissions, "cancel", lambda *args: [])),
    Bug("the router hears zombies", WHOLE, around(Requests, "tokens_produced", old_epochs_are_heard)),
    Bug(
        "the router hears zombies, and twice",
        WHOLE,
        lambda patch: (
            around(Requests, "tokens_produced", old_epochs_are_heard)(patch),
            around(Ledger, "deliver", repetitions_count)(patch),
        )[0],
    ),
    Bug("the router forgets what a client has", WHOLE, instead(requests, "new_request", without_delivered)),
    Bug(
        "tokens go to the router that is dead",
        WHOLE,
        around(Audience, "enter", lambda old, self, i, *rest: i in self._listeners or old(self, i, *rest)),
    ),
    Bug("a new prompt epoch is not noticed", PROMPTS, instead(Intake, "pipeline_replaced", lambda *args: [])),
    Bug("a store's death is not noticed", STORES, instead(Intake, "store_lost", lambda *args: [])),
    Bug("a deposed router publishes", DEPOSED, instead(Election, "guard", lambda self: is_absent("/nobody"))),
    Bug("an outage of etcd ends everybody", CLUSTER, instead(Lease, "settled_at_s", lambda self: 0.0)),
    Bug(
        "who may have been replaced judges others",
        REPLACED,
        lambda patch: (
            instead(Lease, "is_held", lambda self: True)(patch),
            instead(Membership, "is_confirmed", always_confirmed)(patch),
        )[0],
    ),
    Bug("who has just come back judges others", REPLACED, instead(Membership, "standing", lambda self: 1)),
    Bug(
        "who was lost and is back is not published",
        CLUSTER,
        instead(
            cluster,
            "missing_pipelines",
            lambda members, records, draining, _: missing_pipelines(members, records, draining),
        ),
    ),  # fmt: skip
    Bug(
        "the dead stay members",
        REPLACEMENT,
        lambda patch: (
            around(Roster, "put", lambda old, self, record: [] if record.state == GONE else old(self, record))(patch),
            instead(Roster, "delete", lambda *args: [])(patch),
        )[0],
    ),
    Bug("a new router believes what it sees", CLUSTER, around(Lease, "grant", long_held), 40),
    Bug("who could not judge counts that time", CLUSTER, around(Watchdog, "suspects", as_if_never_paused), 10),
    Bug(
        "nobody stands in",
        REPLACEMENT,
        instead(
            cluster,
            "missing_pipelines",
            lambda members, *rest: missing_pipelines([member for member in members if member.state == "active"], *rest),
        ),
    ),  # fmt: skip
]


@pytest.mark.parametrize("bug", BUGS, ids=Bug.id_of)
def test_a_planted_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.must_be_found(monkeypatch)
