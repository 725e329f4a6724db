"""A real etcd for tests, and members to put into it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from common.membership import MemberRecord
from deploy.etcd_server import EtcdServer

Event = TypeVar("Event")


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One etcd for a whole module; a test keeps to a cluster name of its own."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd that a test may kill."""
    with EtcdServer(tmp_path) as server:
        yield server


def member(name: str, incarnation: str = "1", state: str = "active", **detail: str | int | float) -> MemberRecord:
    return MemberRecord(
        name=name,
        role="token_stage",
        incarnation=incarnation,
        pid=1,
        host="localhost",
        endpoint="tcp://127.0.0.1:1234",
        pipeline="tokens-0",
        stage_index=0,
        num_stages=1,
        layers=(0, 4),
        state=state,
        detail=detail,
    )


async def take(events: AsyncGenerator[Event, None], num: int) -> list[Event]:
    """The next `num` events; fails after 15 s."""
    async with asyncio.timeout(15):
        return [await anext(events) for _ in range(num)]
