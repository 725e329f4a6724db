"""Kills one side of a transfer, again and again: `python -m loadtest.kv_kills --runs N --json FILE`.

A writer fills the two halves of an owner's pool in turns; at a random moment one of the two processes gets SIGKILL.
Then: the survivor must notice within the deadline and have no descriptor more than before; what the writer reported as
there must be there; what the owner's checksums accept must be what was sent; and nothing may be left in /dev/shm. Both
processes are forks of this one, which has everything imported already, so that a run takes a fraction of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import msgspec
import numpy as np

from common.kv.arrival import Arrival, pool_checksum, verify_arrival
from common.kv.checksum import SpanBinding
from common.kv.choice import restricted
from common.kv.errors import LinkError
from common.kv.geometry import plan_copies
from common.kv.layout import PoolLayout
from common.kv.link import GrantOffer, open_link
from common.kv.nixl_agent import nixl_module
from common.kv.pool import Bytes, KvPool
from common.kv.server import PoolServer
from loadtest.figures import save
from loadtest.machine import describe_machine
from loadtest.options import add_json, add_runs, add_seed, new_parser

LAYOUT = PoolLayout(
    first_layer=0,
    last_layer=8,
    num_blocks=128,
    block_size=16,
    num_kv_heads=4,
    head_dim=64,
    dtype="float32",
    fingerprint="kills",
)
"""32 MiB; a transfer fills half of it."""
DEADLINE_S = 5.0
PATIENCE_S = 3 * DEADLINE_S
"""Whoever has said nothing for so long hangs."""
MAX_DELAY_S = 0.1
_CONTENT = np.random.default_rng(0).integers(0, 256, LAYOUT.total_bytes, dtype=np.uint8)


@dataclass(slots=True)
class Outcome:
    """Of one run. `transfer`: the kill came after a transfer began and before its end was reported."""

    seed: int
    link: str
    victim: str
    was_in_transfer: bool = False
    num_transfers: int = 0
    error: str = ""
    noticed_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Side:
    """A forked process that reads lines and writes lines."""

    def __init__(self, body: Callable[[TextIO, TextIO], Coroutine[Any, Any, None]]) -> None:
        to_child, from_parent = os.pipe()
        to_parent, from_child = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(from_parent)
            os.close(to_parent)
            _become(body, os.fdopen(to_child), os.fdopen(from_child, "w", buffering=1))
        os.close(to_child)
        os.close(from_child)
        self._out = os.fdopen(from_parent, "w", buffering=1)
        self._in = to_parent
        self._code: int | None = None
        self._received = b""

    def send(self, line: str) -> None:
        self._out.write(line + "\n")

    def read(self) -> str:
        """The next line, "" at its end. Raises `TimeoutError` where there is none for too long."""
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._in], [], [], PATIENCE_S)
            if not ready:
                raise TimeoutError
            piece = os.read(self._in, 1 << 16)
            if not piece:
                return ""
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code once it has ended by itself; a signal's number counts negative."""
        if self._code is None:
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def close(self) -> None:
        """It is gone afterwards."""
        if self._code is None:
            self.kill()
            self.wait()
        self._out.close()
        os.close(self._in)


def _become(body: Callable[[TextIO, TextIO], Coroutine[Any, Any, None]], inlet: TextIO, outlet: TextIO) -> None:
    try:
        asyncio.run(body(inlet, outlet))
        code = 0
    except BaseException:  # noqa: BLE001 - nothing may escape into what the parent was doing
        traceback.print_exc()
        code = 1
    os._exit(code)


# ------------------------------------------------------------------ the two sides


async def own(inlet: TextIO, outlet: TextIO) -> None:
    """Grants a pool; a line with an arrival is answered with what the checksum says and whether the bytes are right, an
    empty line with the descriptors that are open."""
    pool = KvPool.create(LAYOUT, name="owner")
    server = await PoolServer.start(pool, "127.0.0.1", "first")
    before = open_files()
    print(server.offer.encode(), file=outlet)
    while line := inlet.readline():
        if line.strip():
            arrival = msgspec.json.decode(line, type=Arrival)
            is_accepted = verify_arrival(pool, arrival)
            expected = half(content(int(arrival.sequence_id)), arrival.blocks)
            print(json.dumps([is_accepted, bool((half(pool.memory, arrival.blocks) == expected).all())]), file=outlet)
        else:
            print(json.dumps(await leaked(before)), file=outlet)


async def write(offer: GrantOffer, outlet: TextIO) -> None:
    """Says what it is about to send, sends it, says that it is there; at the end, why it ended."""
    pool = KvPool.create(LAYOUT, name="writer")
    await (await open_link(offer, pool, timeout_s=DEADLINE_S)).aclose()  # what a process opens once, it keeps
    before = open_files()
    link = await open_link(offer, pool, timeout_s=DEADLINE_S)
    number = 0
    try:
        while True:
            number += 1
            pool.memory[:] = content(number)
            arrival = about(pool, number)
            print(msgspec.json.encode(arrival).decode(), file=outlet)
            tokens = (0, len(arrival.blocks) * LAYOUT.block_size)
            await link.write(pool, plan_copies(LAYOUT, arrival.blocks, LAYOUT, arrival.blocks, tokens, LAYOUT.layers))
            print("there", file=outlet)
    except LinkError as error:
        pool.memory[:] = 0  # ours again
        try:
            await link.aclose()
        except LinkError as unconfirmed:
            assert unconfirmed.may_still_write
        print(json.dumps({"error": error.code, "leaked": await leaked(before)}), file=outlet)


def about(pool: KvPool, number: int) -> Arrival:
    """Half of the pool, as transfer `number`."""
    first = number % 2 * LAYOUT.num_blocks // 2
    blocks = list(range(first, first + LAYOUT.num_blocks // 2))
    tokens = (0, len(blocks) * LAYOUT.block_size)
    binding = SpanBinding(LAYOUT.fingerprint, str(number), LAYOUT.layers, tokens, b"")
    checksum = pool_checksum(pool, blocks, binding)
    return Arrival("owner", 0, str(number), 1, LAYOUT.layers, 0, tokens[1], blocks, b"", checksum)


def content(number: int) -> Bytes:
    return _CONTENT + np.uint8(number % 256)


def half(memory: Bytes, blocks: Any) -> Bytes:
    """The bytes of these blocks in all layers."""
    return memory.reshape(LAYOUT.num_layers * 2, LAYOUT.num_blocks, -1)[:, blocks[0] : blocks[-1] + 1]


def open_files() -> Counter[str]:
    """How many sockets and shared memories this process has open."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        # ZeroMQ's threads close descriptors at any time: one that was listed may be gone
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    to_itself = _to_itself(names)
    counted = [name for name in names if name.startswith(("socket:", "/memfd:")) and name not in to_itself]
    return Counter(name.partition(":")[0] for name in counted)


def _to_itself(names: list[str]) -> set[str]:
    """Those of TCP connections of which both ends are among `names`: the transfer library makes one, and accepts it
    when the next peer comes."""
    rows = (line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:])
    known = {(row[1], row[2]): f"socket:[{row[9]}]" for row in rows}
    ours = {ends: name for ends, name in known.items() if name in names}
    return {name for (here, there), name in ours.items() if (there, here) in ours}


async def leaked(before: Counter[str]) -> dict[str, int]:
    """What is open now and was not before; libraries close in their own time."""
    until_s = time.monotonic() + DEADLINE_S
    while (more := open_files() - before) and time.monotonic() < until_s:
        await asyncio.sleep(0.01)
    return dict(more)


# ------------------------------------------------------------------ one run


def run_once(link: str, victim: str, seed: int) -> Outcome:
    """Kills `victim`, "owner" or "writer"."""
    outcome, generator = Outcome(seed, link, victim), random.Random(seed)
    owner = Side(own)
    offer = restricted(GrantOffer.decode(owner.read()), link)
    writer = Side(lambda inlet, outlet: write(offer, outlet))
    try:
        first = writer.read()
        time.sleep(generator.uniform(0, MAX_DELAY_S))
        (owner if victim == "owner" else writer).kill()
        killed_s = time.monotonic()
        lines = [first, *_rest(writer)]
        outcome.noticed_s = round(time.monotonic() - killed_s, 3)
        end = json.loads(lines.pop()) if victim == "owner" and "error" in lines[-1] else None
        outcome.num_transfers = lines.count("there")
        outcome.was_in_transfer = lines[-1] != "there"
        if victim == "writer":
            _judge_owner(owner, lines, outcome)
        elif end is None:
            outcome.wrong.append(f"the writer ended without a typed error, with code {writer.wait()}")
        else:
            outcome.error = end["error"]
            if end["leaked"]:
                outcome.wrong.append(f"the writer still has {end['leaked']}")
    except TimeoutError:
        outcome.wrong.append(f"nothing was heard for {PATIENCE_S} s")
    finally:
        owner.close()
        writer.close()
    return outcome


def _rest(side: Side) -> list[str]:
    """Its lines until it ends; a line that was cut off by its death does not count."""
    lines = []
    while line := side.read():
        lines.append(line)
    return lines


def _judge_owner(owner: Side, lines: list[str], outcome: Outcome) -> None:
    arrivals = [line for line in lines if line != "there"]
    for index, arrival in enumerate(arrivals[-2:], start=max(0, len(arrivals) - 2)):
        owner.send(arrival)
        is_accepted, is_right = json.loads(owner.read())
        if is_accepted and not is_right:
            outcome.wrong.append("the owner accepted what was not sent")
        if index < outcome.num_transfers and not (is_accepted and is_right):
            outcome.wrong.append("what was reported as there is not there")
    owner.send("")
    leaks = json.loads(owner.read())
    if leaks:
        outcome.wrong.append(f"the owner still has {leaks}")


def run_all(links: list[str], num_runs: int, seed: int, on_outcome: Callable[[Outcome], None]) -> dict[str, Any]:
    """Links and victims in turns; what went wrong is in "wrong"."""
    before = shared_memory()
    outcomes = []
    for number in range(num_runs):
        victim = ("owner", "writer")[number // len(links) % 2]
        outcomes.append(run_once(links[number % len(links)], victim, seed + number))
        on_outcome(outcomes[-1])
    left = sorted(shared_memory() - before)
    return {
        "num_runs": num_runs,
        "num_in_transfer": sum(outcome.was_in_transfer for outcome in outcomes),
        "max_noticed_s": max(outcome.noticed_s for outcome in outcomes),
        "errors": Counter(f"{outcome.link} {outcome.error}" for outcome in outcomes if outcome.error),
        "left_in_dev_shm": left,
        "wrong": [asdict(outcome) for outcome in outcomes if outcome.wrong],
    }


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if not name.startswith("__KMP_")}


def main() -> int:
    """Exit code 1 where anything went wrong."""
    parser = new_parser("kv_kills", __doc__)
    add_json(parser, required=False)
    add_runs(parser, 1000, "kills, of links and sides in turns")
    add_seed(parser, "of the moments")
    known = ["shm", "zmq", *(["nixl"] if nixl_module() else [])]
    parser.add_argument("--link", action="append", choices=known, help="only this one; may be repeated")
    arguments = parser.parse_args()

    def show(outcome: Outcome) -> None:
        for text in outcome.wrong:
            print(f"seed {outcome.seed}, {outcome.link}, {outcome.victim} killed: {text}", flush=True)
        if (outcome.seed - arguments.seed + 1) % 100 == 0:
            print(f"{outcome.seed - arguments.seed + 1} runs", flush=True)

    results = run_all(arguments.link or known, arguments.runs, arguments.seed, show)
    print(json.dumps(results, indent=1))
    if arguments.json:
        results = {"machine": describe_machine(), "options": vars(arguments)} | results
        save(arguments.json, results)
    return 1 if results["wrong"] or results["left_in_dev_shm"] else 0


if __name__ == "__main__":
    sys.exit(main())
