"""The faults that `loadtest.chaos` knows: how the system is started for them, and what is done to whom."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from common.fault_hooks import STUCK_LOOP, STUCK_STEP, VARIABLE
from dejavu import AsyncClient
from deploy.running import running_system
from loadtest.history import recomputed_tokens
from loadtest.partition import (
    FAR_PROMPT,
    FAR_ROUTER,
    FAR_STAGE,
    FAR_STORE,
    FARTHER_STAGE,
    PARTITION_S,
    Away,
    cut_between,
    cut_off,
    divided_system,
    has_far_store,
    move_away,
    use_far_store,
)
from loadtest.resets import RESETS_S, Place, alone, reset
from loadtest.strikes import (
    STOPPED_S,
    STORM_S,
    Status,
    Strike,
    both,
    damage_stores,
    kill,
    kill_etcd,
    kill_token_stages,
    kill_twice,
    limit_files,
    poke,
    shuffle_stores,
    stop,
    stop_etcd,
    storm,
)

DEFAULT_OUTAGE_S = 15.0
LEASE_S = 5.0
"""After so long it shows whom a lapsed lease was held against."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What we hold ourselves to (99 of 100 runs); None: nothing is said about it."""

    detected_s: float | None = None
    next_token_s: float | None = None
    protected_s: float | None = None
    """all streams have a copy of (nearly) all their KV again"""


DEATH = Limits(0.1, 1.0)
STOP = Limits(0.7, 1.5)
STUCK = Limits(1.5, 2.5)
PAIR = Limits(0.1, 5.0)
NO_STALL_S = 0.25
NO_STALL = Limits(next_token_s=NO_STALL_S)
LOST_STEP = Limits(next_token_s=7.0)
"""It is missed after 5 s where none comes through behind it."""
REPEATED_S = 4.0
"""What was lost is said again after 2 s."""


@dataclass(frozen=True, slots=True)
class Fault:
    """How the system is started, what is done to it, and what must come of it."""

    what: str
    strike: Strike
    arguments: tuple[str, ...] = ()
    max_recomputed_tokens: int | None = None
    """per stream; None: no bound"""
    limits: Limits = PAIR
    environment: Mapping[str, str] = field(default_factory=dict)
    num_leaving: int = 0
    """so many more streams, whose client is killed within a second of the strike"""
    is_late: bool = False
    """it makes no sense before all prompts are computed"""
    lasts_s: float = 0.0
    """until then streams are run again and again"""
    shows: Callable[[Status, Status], bool] = lambda before, after: True
    """whether `status` before and after says that the fault has come to pass where it should"""
    is_apart: bool = False
    """needs namespaces of its own (`loadtest.partition`)"""
    system: Callable[[Sequence[str], Mapping[str, str]], AbstractAsyncContextManager[str]] = running_system
    prepare: Callable[[AsyncClient], Awaitable[None]] | None = None
    """before every run"""


RESPAWN_S = 1.0
"""of a stage, with the weights of the shipped model"""
CHUNK_TOKENS = 256
"""`--chunk-size` of `dejavu serve`"""
TWO_STAGES = ("--prompt-stages", "2", "--token-stages", "2")
STANDBY = ("--standbys", "1")
HOOKS = {VARIABLE: "1"}
STANDS_BY = ("--standby",)


def known_faults(outage_s: float = DEFAULT_OUTAGE_S) -> dict[str, Fault]:
    """By name; `outage_s` is for how long etcd is stopped."""
    return (
        _deaths() | _silences() | _pairs() | _outages(outage_s) | _surroundings() | _partitions() | _cuts() | _resets()
    )


def _deaths() -> dict[str, Fault]:
    return {
        "token-kill": Fault(
            "kill -9 of a token stage, a standby is there", kill("token_stage"), (*TWO_STAGES, *STANDBY), 4, DEATH
        ),
        "token-kill-alone": Fault(
            "kill -9 of a token stage, no standby", kill("token_stage"), TWO_STAGES, 4, Limits(0.1, RESPAWN_S + 1.0)
        ),
        "prompt-kill": Fault(
            "kill -9 of a prompt stage", kill("prompt_stage"), (*TWO_STAGES, *STANDBY), CHUNK_TOKENS, DEATH
        ),
        "store-kill": Fault(
            "kill -9 of a cache store",
            kill("cache_store"),
            ("--cache-stores", "2"),
            0,
            Limits(0.1, NO_STALL_S, 10.0),
        ),
        "router-kill": Fault(
            "kill -9 of the leading router", kill("router", "leader"), ("--routers", "2"), 0, Limits(0.5, 3.0)
        ),
        "etcd-kill": Fault(
            "kill -9 of etcd, which is started again", kill_etcd, (), 0, Limits(next_token_s=NO_STALL_S)
        ),
        "token-kill-and-leavers": Fault(
            "kill -9 of a token stage, and a client with 8 streams within a second",
            kill("token_stage"),
            (*TWO_STAGES, *STANDBY),
            4,
            DEATH,
            num_leaving=8,
        ),
    }


def _silences() -> dict[str, Fault]:
    stopped = f"SIGSTOP of a {{}}, SIGCONT {STOPPED_S:g} s later"
    return {
        "token-stop": Fault(stopped.format("token stage"), stop("token_stage"), STANDBY, 4, STOP),
        "token-stop-no-kill": Fault(
            "the same, and nobody kills the stopped one: it wakes up",
            stop("token_stage"),
            (*STANDBY, "--no-kill"),
            4,
            STOP,
            lasts_s=STOPPED_S + LEASE_S,
        ),
        "prompt-stop-no-kill": Fault(
            "SIGSTOP of a prompt stage, and nobody kills it: it wakes up 10 s later",
            stop("prompt_stage"),
            (*STANDBY, "--no-kill"),
            CHUNK_TOKENS,
            STOP,
            lasts_s=STOPPED_S + LEASE_S,
        ),
        "prompt-stop": Fault(stopped.format("prompt stage"), stop("prompt_stage"), STANDBY, CHUNK_TOKENS, STOP),
        "router-stop": Fault(
            stopped.format("leading router"), stop("router", "leader"), ("--routers", "2"), 0, Limits(0.7, 3.0)
        ),
        "stuck-loop": Fault(
            "the event loop of a token stage does nothing for 10 s",
            poke("token_stage", STUCK_LOOP),
            STANDBY,
            4,
            STUCK,
            environment=HOOKS,
        ),
        "stuck-step": Fault(
            "a step of a token stage takes 10 s", poke("token_stage", STUCK_STEP), STANDBY, 4, STUCK, environment=HOOKS
        ),
    }


def _pairs() -> dict[str, Fault]:
    return {
        "two-tokens": Fault("kill -9 of both token stages at once", kill_token_stages, (*TWO_STAGES, *STANDBY)),
        "token-and-prompt": Fault(
            "kill -9 of a token stage and a prompt stage within 0.5 s",
            both(kill("token_stage"), kill("prompt_stage"), 0.5),
            (*TWO_STAGES, *STANDBY),
        ),
        "token-and-store": Fault(
            "kill -9 of a token stage and a store within 0.5 s",
            both(kill("token_stage"), kill("cache_store"), 0.5),
            (*STANDBY, "--cache-stores", "2"),
        ),
        "token-and-router": Fault(
            "kill -9 of a token stage and the leading router within 0.5 s",
            both(kill("token_stage"), kill("router", "leader"), 0.5),
            (*STANDBY, "--routers", "2"),
        ),
        "token-and-etcd": Fault(
            "kill -9 of a token stage and of etcd within 0.5 s",
            both(kill("token_stage"), kill_etcd, 0.5),
            (*TWO_STAGES, *STANDBY),
        ),
        "prompt-and-router": Fault(
            "kill -9 of a prompt stage and the leading router within 0.5 s",
            both(kill("prompt_stage"), kill("router", "leader"), 0.5),
            (*TWO_STAGES, *STANDBY, "--routers", "2"),
        ),
        "second-during-recovery": Fault(
            "kill -9 of a token stage, and of its standby once the death is noticed",
            kill_twice,
            (*TWO_STAGES, *STANDBY),
        ),
        "storm": Fault(
            f"kill -9 of five services, whichever, in {STORM_S:g} s",
            storm,
            (*TWO_STAGES, *STANDBY, "--cache-stores", "2", "--routers", "2"),
            lasts_s=STORM_S,
        ),
    }


def _outages(outage_s: float) -> dict[str, Fault]:
    return {
        "etcd-outage": Fault(
            f"etcd answers nobody for {outage_s:g} s",
            stop_etcd(outage_s),
            (*TWO_STAGES, *STANDBY, "--routers", "2"),
            0,
            Limits(next_token_s=NO_STALL_S),
            lasts_s=outage_s + 2 * LEASE_S,
        ),
        "token-kill-in-outage": Fault(
            f"kill -9 of a token stage while etcd answers nobody for {outage_s:g} s",
            both(stop_etcd(outage_s), kill("token_stage"), 2.0),
            (*TWO_STAGES, *STANDBY),
            limits=Limits(next_token_s=outage_s + 2.0),
            lasts_s=outage_s + 2.0,
        ),
    }


def _surroundings() -> dict[str, Fault]:
    return {
        "store-corrupt": Fault(
            "all copies in the store are damaged, then a token stage is killed",
            both(damage_stores, kill("token_stage")),
            (*TWO_STAGES, *STANDBY),
            is_late=True,
            # whole sequences, for nothing of theirs was of use
            shows=lambda before, after: recomputed_tokens(before, after) > 500,
        ),
        "store-stale": Fault(
            "every copy in the store is that of other tokens, then a token stage is killed",
            both(shuffle_stores, kill("token_stage")),
            (*TWO_STAGES, *STANDBY),
            is_late=True,
            shows=lambda before, after: recomputed_tokens(before, after) > 500,
        ),
        "disk-full": Fault(
            "the store's disk refuses to take more, and a token stage is killed",
            both(limit_files(STOPPED_S), kill("token_stage"), 4.0),
            (*STANDBY, "--disk-memory", "1G"),
            4,
            Limits(next_token_s=1.0),
            lasts_s=STOPPED_S,
            shows=lambda before, after: _disk_count(after, "full") > _disk_count(before, "full"),
        ),
    }


def _partitions() -> dict[str, Fault]:
    return {
        "partition": Fault(
            f"for {PARTITION_S:g} s no packet reaches or leaves a token stage, then all do again",
            cut_off(FAR_STAGE),
            max_recomputed_tokens=4,
            limits=Limits(1.5, 2.5),
            lasts_s=PARTITION_S + LEASE_S,
            is_apart=True,
            system=divided_system(Away("token-0-stage-0", FAR_STAGE, STANDS_BY)),
            prepare=move_away(FAR_STAGE),
        ),
        "store-partition": Fault(
            f"for {PARTITION_S:g} s no packet reaches or leaves one of two cache stores, then all do again",
            cut_off(FAR_STORE),
            max_recomputed_tokens=0,
            limits=Limits(1.5, NO_STALL_S, PARTITION_S + LEASE_S),
            lasts_s=PARTITION_S + LEASE_S,
            shows=lambda before, after: has_far_store(after) and _was_found_again(before, after),
            is_apart=True,
            system=divided_system(Away("cache-store-0", FAR_STORE)),
            prepare=use_far_store,
        ),
    }


def _cuts() -> dict[str, Fault]:
    what = f"for {PARTITION_S:g} s no packet passes between a token stage and {{}}, all others do"
    farther_stage = Away("token-0-stage-0", FAR_STAGE, STANDS_BY, "farther")
    second_stage = Away("token-0-stage-1", FARTHER_STAGE, STANDS_BY, "farther")

    def cut(other: str, far: Away, farther: Away, limits: Limits, *more: str, missed: Sequence[str] = ()) -> Fault:
        return Fault(
            what.format(other),
            cut_between(*missed),
            more,
            0 if not missed else 4,
            limits,
            lasts_s=PARTITION_S + LEASE_S,
            is_apart=True,
            system=divided_system(far, farther),
            prepare=move_away(far.name, farther.name),
        )

    far_stage = Away("token-0-stage-0", FAR_STAGE, STANDS_BY)
    return {
        "cut-token-token": cut(
            "the next one", far_stage, second_stage, LOST_STEP, "--token-stages", "2", missed=[FAR_STAGE]
        ),
        "cut-prompt-token": cut(
            "a prompt stage", Away("prompt-0-stage-0", FAR_PROMPT, STANDS_BY), farther_stage, NO_STALL
        ),
        "cut-store-token": cut("a cache store", Away("cache-store-0", FAR_STORE), farther_stage, NO_STALL),
        "cut-router-token": cut(
            "the leading router", Away("router-0", FAR_ROUTER), farther_stage, Limits(1.5, 2.5), missed=[FAR_STAGE]
        ),
    }


def _resets() -> dict[str, Fault]:
    what = f"for {RESETS_S:g} s connections between a token stage and {{}} are reset: what was on its way is lost"

    def broken(other: str, place: Place, limits: Limits, *more: str, is_missed: bool = False) -> Fault:
        strike = reset(("token_stage", 0), place, is_missed=is_missed)
        tokens = 4 if is_missed else 0
        return Fault(what.format(other), strike, (*STANDBY, *more), tokens, limits, is_apart=True, system=alone)

    return {
        "reset-token-token": broken("the next one", ("token_stage", 1), LOST_STEP, *TWO_STAGES, is_missed=True),
        "reset-prompt-token": broken("a prompt stage", ("prompt_stage", 0), NO_STALL),
        "reset-store-token": broken("a cache store", ("cache_store", None), NO_STALL),
        "reset-router-token": broken("the leading router", ("router", None), Limits(next_token_s=REPEATED_S)),
    }


def _was_found_again(before: Status, after: Status) -> bool:
    """Whether one that was taken for dead has come back, and nobody else."""
    return bool(after["counters"]["false_failovers"] == before["counters"]["false_failovers"] + 1)


def _disk_count(status: Status, name: str) -> int:
    return sum(service["disk"][name] for service in status["services"] if service.get("disk"))


FAULTS = known_faults()
