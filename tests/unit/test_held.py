"""What a router does with requests that come while nobody leads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dejavu.params import SamplingParams
from dejavu.wire import Accepted, Ended, NotLeader, RouterMessage, Submit
from services.router import held
from services.router.held import Held
from services.router.service import RouterOptions, RouterService
from tests.unit.fleet_stages import SPEC

CLIENT = b"client"


class Router(RouterService):
    """One that says to nobody what it says."""

    def __init__(self) -> None:
        super().__init__(RouterOptions("router-1", "", "c", "h", "", "", 0, may_kill=True), SPEC, None)
        self.sent: list[RouterMessage] = []
        self.cluster = self._cluster = cast(Any, SimpleNamespace(members={}, leader="", is_leader=False))
        self._clients.heard(CLIENT, 0.0)

    def to_client(self, client: bytes, message: RouterMessage) -> None:
        self.sent.append(message)

    def told_of_leader(self, name: str, *, is_me: bool = False) -> None:
        self.cluster.leader, self.cluster.is_leader = name, is_me
        self._submissions.leader_changed()

    def ask(self, request_id: str, client: bytes = CLIENT) -> None:
        self._submissions.submit(client, Submit(request_id, [1, 2], SamplingParams(), []))


def other_router() -> Any:
    return SimpleNamespace(incarnation="other", detail={"client_endpoint": "tcp://h:1"})


async def test_requests_wait_for_the_next_leader() -> None:
    router = Router()
    router.ask("first")
    router.ask("second")
    router.told_of_leader("")
    assert router.sent == []
    router.told_of_leader("router-1", is_me=True)
    assert [message.request_id for message in router.sent if isinstance(message, Accepted)] == ["first", "second"]


async def test_who_leads_is_told() -> None:
    router = Router()
    router.ask("held")
    router.cluster.members["router-0"] = other_router()
    router.told_of_leader("router-0")
    router.ask("later")
    assert router.sent == [NotLeader("held", "tcp://h:1"), NotLeader("later", "tcp://h:1")]


async def test_the_one_before_under_our_name_leads_no_more() -> None:
    router = Router()
    router.cluster.members["router-1"] = SimpleNamespace(incarnation=router._incarnation, detail={})
    router.cluster.leader = "router-1"
    router.ask("r")
    assert router.sent == []


async def test_nobody_waits_for_ever() -> None:
    router = Router()
    submit = Submit("r", [1, 2], SamplingParams(), [])
    router._submissions.submit(CLIENT, submit)
    router._submissions.hold_no_longer(CLIENT, submit)
    router._submissions.hold_no_longer(CLIENT, submit)
    assert router.sent == [NotLeader("r", "")]


async def test_what_waits_can_be_cancelled_and_is_not_begun_for_who_is_gone() -> None:
    router = Router()
    router.ask("cancelled")
    router._submissions.cancel(CLIENT, "cancelled")
    router.ask("gone", b"somebody else")
    router.told_of_leader("router-1", is_me=True)
    assert router.sent == [Ended("cancelled", "cancelled")]


def test_not_more_than_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "MAX_HELD", 2)
    waiting, submit = Held(), Submit("r", [1], SamplingParams(), [])
    assert waiting.add(b"a", submit) and waiting.add(b"b", submit)
    assert not waiting.add(b"c", submit)
    assert [client for client, _ in waiting.take_all()] == [b"a", b"b"]
