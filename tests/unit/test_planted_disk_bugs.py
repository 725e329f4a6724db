"""The simulation of a store and its disk finds what it is there to find."""

from __future__ import annotations

from typing import Any

import pytest

from common.kv import file_link, file_pool
from common.kv.file_format import PAGE_BYTES
from common.kv.file_link import Disk
from common.kv.file_pool import FilePool
from common.kv.pool import Bytes
from services.cache_store.disk import DiskTier
from services.cache_store.shelf import Replica
from tests.unit import test_store_simulation
from tests.unit.planting import Bug, around, instead
from tests.unit.simulated_disk import CHUNK_BYTES, SimulatedDisk

STORE = test_store_simulation.simulate


def not_verified(self: FilePool, number: int, chunk: Bytes) -> None:
    """Whatever is as long as it should be is taken for whole."""
    with file_pool.typed_errors(self.name):
        vars(file_pool)["os"].preadv(self.fd, [chunk.data], PAGE_BYTES + number * CHUNK_BYTES)


async def counted_early(old: Any, self: DiskTier, key: str, replica: Replica) -> bool:
    replica.num_on_disk = replica.num_tokens
    return bool(await old(self, key, replica))


async def never_tried_again(old: Any, self: DiskTier, names: Any) -> None:
    await old(self, names)
    self._undeleted.clear()


BUGS = [
    Bug(
        "a file has its name before it is on the disk",
        STORE,
        instead(SimulatedDisk, "fdatasync", lambda *args: None),
        2,
    ),
    Bug("a name counts before it is on disk", STORE, instead(file_link, "sync_directory", lambda directory: None), 2),
    Bug("tokens count before they are on the disk", STORE, around(DiskTier, "_append", counted_early), 2),
    Bug("a file is believed by its length", STORE, instead(FilePool, "_load", not_verified), 19),
    Bug(
        "who closes a file that hangs leaves it open",
        STORE,
        around(Disk, "run", lambda old, self, work, undo=None, *, is_owed=False: old(self, work, undo)),
        57,
    ),
    Bug("what could not be deleted is forgotten", STORE, around(DiskTier, "_delete_files", never_tried_again), 23),
]


@pytest.mark.parametrize("bug", BUGS, ids=Bug.id_of)
def test_a_planted_bug_is_found(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.must_be_found(monkeypatch)
