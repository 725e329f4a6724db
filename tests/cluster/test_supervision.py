"""The parent of a system's processes: what it starts, what it hears of their ends, what it starts again."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest

from common.process import INCARNATION_VARIABLE, PARENT_VARIABLE
from common.service import TRY_AGAIN_EXIT
from deploy import children
from deploy.children import Child, DirectSpawner, Nursery, Spawner
from deploy.layout import ServiceCommand
from deploy.supervisor import MAX_SHORT_LIVES, ServiceExit, ServiceGaveUp, Supervisor
from tests.cluster.system import ROOT, descendants

pytestmark = pytest.mark.cluster

STAGE = "tests.cluster.stand_in_stage"


@pytest.fixture(params=[DirectSpawner, Nursery])
async def spawner(request: pytest.FixtureRequest) -> AsyncIterator[Spawner]:
    if request.param is DirectSpawner:
        yield DirectSpawner(ROOT)
        return
    nursery = Nursery(ROOT, ["json"])
    yield nursery
    nursery.close()


def command(what: str, name: str = "token-0-stage-0") -> ServiceCommand:
    return ServiceCommand(name, "token_stage", (sys.executable, "-m", STAGE, what))


async def first_line(child_output: asyncio.StreamReader) -> list[str]:
    return (await child_output.readline()).decode().split()


async def test_a_child_is_a_process_of_its_own(spawner: Spawner) -> None:
    child = await spawner.spawn(command("wait"), {INCARNATION_VARIABLE: "abc"})
    pid, parent, session, incarnation = await first_line(child.output)
    assert (int(pid), int(parent), int(session), incarnation) == (child.pid, os.getpid(), child.pid, "abc")
    assert child.pid in descendants(os.getpid())
    shown = Path("/proc", str(child.pid), "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    assert shown == [argument.encode() for argument in command("wait").argv]
    child.send_signal(signal.SIGKILL)
    assert await child.exited == -signal.SIGKILL
    assert await child.output.read() == b""
    child.send_signal(signal.SIGKILL)  # nobody is there, nobody is hit


async def test_a_child_whose_parent_has_died_before_it_could_look_ends(spawner: Spawner) -> None:
    child = await spawner.spawn(command("wait"), {PARENT_VARIABLE: "1"})
    assert await child.exited == -signal.SIGKILL


async def test_a_start_that_is_given_up_leaves_nobody() -> None:
    before = descendants(os.getpid())
    spawning = asyncio.ensure_future(DirectSpawner(ROOT).spawn(command("wait"), {}))
    await asyncio.sleep(0)
    (pid,) = descendants(os.getpid()) - before
    spawning.cancel()
    await asyncio.wait([spawning])
    assert spawning.cancelled() and not Path("/proc", str(pid)).exists()


async def test_a_child_that_nobody_waits_for_any_more_is_ended() -> None:
    born: list[Child] = []

    class Late(DirectSpawner):
        async def spawn(self, command: ServiceCommand, environment: Mapping[str, str]) -> Child:
            born.append(await super().spawn(command, environment))
            running.cancel()
            return born[0]

    running = asyncio.ensure_future(Supervisor([command("wait")], Late(ROOT)).run())
    await asyncio.wait([running])
    assert running.cancelled() and born[0].exited.result() == -signal.SIGKILL


@pytest.mark.parametrize(("what", "code"), [("0", 0), ("3", 3), ("raise", 1)])
async def test_exit_codes_are_the_childs(spawner: Spawner, what: str, code: int) -> None:
    child = await spawner.spawn(command(what), {})
    assert await child.exited == code
    assert (b"Traceback" in await child.output.read()) == (what == "raise")


async def test_ends_are_heard_of_where_the_system_has_no_descriptors_of_processes(
    spawner: Spawner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")  # as in gVisor

    monkeypatch.setattr(os, "pidfd_open", refuse)
    child = await spawner.spawn(command("3"), {})
    assert await child.exited == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_children_outlive_the_nursery_and_the_next_is_started_all_the_same(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "ANSWER_LIMIT_S", 0.5)
    nursery = Nursery(ROOT, ["json"])
    child = await nursery.spawn(command("wait"), {})
    await first_line(child.output)
    (nursery_pid,) = descendants(os.getpid()) - {child.pid}
    os.kill(nursery_pid, number)
    following = [await nursery.spawn(command("wait"), {}) for _ in range(2)]
    for other in following:
        assert (await first_line(other.output))[1] == str(os.getpid())
    assert not child.exited.done()
    nursery.close()
    for other in [child, *following]:
        other.send_signal(signal.SIGKILL)
        await other.exited


PARENT = """
import asyncio, sys
from deploy.children import DirectSpawner, Nursery
from tests.cluster.system import ROOT
from tests.cluster.test_supervision import command
async def main():
    for spawner in (DirectSpawner(ROOT), Nursery(ROOT, ["json"])):
        child = await spawner.spawn(command("wait"), {})
        print((await child.output.readline()).split()[0].decode(), flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


async def test_a_killed_parent_takes_its_children_along() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    children = [int(await parent.stdout.readline()) for _ in range(2)]
    watched = [os.pidfd_open(pid) for pid in [*children, *descendants(parent.pid)]]
    assert len(watched) == 5  # both children twice, and the nursery
    parent.kill()
    await parent.wait()
    for descriptor in watched:  # readable once the process has ended
        await asyncio.to_thread(select.select, [descriptor], [], [])
        os.close(descriptor)


def ends_into(queue: asyncio.Queue[ServiceExit]) -> Callable[[ServiceExit], None]:
    return queue.put_nowait


async def test_every_end_is_reported_with_the_incarnation_that_ended(spawner: Spawner) -> None:
    ends: asyncio.Queue[ServiceExit] = asyncio.Queue()
    supervisor = Supervisor([command("7")], spawner, ends_into(ends))
    with pytest.raises(ServiceGaveUp, match="token-0-stage-0"):
        await supervisor.run()
    seen = [ends.get_nowait() for _ in range(3)]
    assert [(e.name, e.role, e.exit_code) for e in seen] == [("token-0-stage-0", "token_stage", 7)] * 3
    assert len({e.pid for e in seen}) == len({e.incarnation for e in seen}) == 3


async def test_when_one_is_given_up_the_others_are_ended(spawner: Spawner) -> None:
    ends: asyncio.Queue[ServiceExit] = asyncio.Queue()
    supervisor = Supervisor([command("wait", "token-0-stage-1"), command("raise")], spawner, ends_into(ends))
    with pytest.raises(ServiceGaveUp, match=r"token-0-stage-0 .*exit 1\): RuntimeError: as told"):
        await supervisor.run()
    seen = [ends.get_nowait() for _ in range(ends.qsize())]
    codes = {ended.name: ended.exit_code for ended in seen}
    assert codes == {"token-0-stage-0": 1, "token-0-stage-1": -signal.SIGKILL}


async def test_who_ends_in_order_is_started_again_however_often(spawner: Spawner) -> None:
    ends: asyncio.Queue[ServiceExit] = asyncio.Queue()
    supervisor = Supervisor([command("0")], spawner, ends_into(ends))
    running = asyncio.ensure_future(supervisor.run())
    for _ in range(MAX_SHORT_LIVES + 1):
        assert (await ends.get()).exit_code == 0
    await supervisor.stop()
    await running


async def test_who_waits_for_etcd_is_not_given_up(spawner: Spawner) -> None:
    ends: asyncio.Queue[ServiceExit] = asyncio.Queue()
    supervisor = Supervisor([command(str(TRY_AGAIN_EXIT))], spawner, ends_into(ends))
    running = asyncio.ensure_future(supervisor.run())
    for _ in range(MAX_SHORT_LIVES + 1):
        assert (await ends.get()).exit_code == TRY_AGAIN_EXIT
    await supervisor.stop()
    await running


async def test_what_is_not_there_yet_is_not_waited_for() -> None:
    nursery = Nursery(ROOT, ["torch"])
    supervisor = Supervisor([command("wait")], nursery)
    running = asyncio.ensure_future(supervisor.run())
    await asyncio.sleep(0)  # it has begun to ask the nursery, which imports torch first
    await supervisor.stop()
    await running
    assert supervisor.pid_of("token-0-stage-0") is None
    nursery.close()


async def test_a_killed_child_is_reported_at_once_and_replaced(spawner: Spawner) -> None:
    ends: asyncio.Queue[ServiceExit] = asyncio.Queue()
    supervisor = Supervisor([command("wait")], spawner, ends_into(ends))
    running = asyncio.ensure_future(supervisor.run())
    first = await next_pid(supervisor, 0)
    os.kill(first, signal.SIGKILL)
    ended = await ends.get()
    assert (ended.pid, ended.exit_code) == (first, -signal.SIGKILL)
    await next_pid(supervisor, first)
    supervisor.kill()
    await running
    assert (await ends.get()).incarnation != ended.incarnation


async def test_a_stopped_child_that_nobody_else_watches_is_replaced(spawner: Spawner) -> None:
    ends: asyncio.Queue[ServiceExit] = asyncio.Queue()
    supervisor = Supervisor([command("wait")], spawner, ends_into(ends), ["token_stage"])
    running = asyncio.ensure_future(supervisor.run())
    first = await next_pid(supervisor, 0)
    os.kill(first, signal.SIGSTOP)
    async with asyncio.timeout(10):
        assert (await ends.get()).exit_code == -signal.SIGKILL
    await next_pid(supervisor, first)
    supervisor.kill()
    await running


async def next_pid(supervisor: Supervisor, last: int) -> int:
    while True:
        pid = supervisor.pid_of("token-0-stage-0")
        if pid not in (None, last):
            return pid
        await asyncio.sleep(0)


ENDED_WHILE_ETCD_STARTS = """
import os, sys
asked = []
def end(event, arguments):
    if event == "http.client.connect" and not asked:  # whether etcd is healthy
        asked.append(event)
        os.kill(os.getpid(), {number})
sys.addaudithook(end)
from dejavu.cli import main
sys.exit(main(["serve", "--port", "0", "--no-nursery", "--device", "cpu", "--state-dir", {state!r}]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_end_while_etcd_is_being_started_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    program = ENDED_WHILE_ETCD_STARTS.format(number=int(number), state=str(tmp_path / "state"))
    environment = os.environ | {"TMPDIR": str(temporary)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "state" / "endpoints").exists()
