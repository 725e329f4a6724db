"""What a store may still offer after it may have been taken for dead."""

from __future__ import annotations

import numpy as np

from common.messages import pack_ids
from common.replica_messages import Placed, ReplicaItem
from services.cache_store.shelf import Shelf

IDS = list(range(1, 40))
KEY = "r/0"


def read(shelf: Shelf, epoch: int, batch: int, start: int, end: int) -> bool:
    """A batch with tokens [start, end) of the sequence; False: refused."""
    item = ReplicaItem(KEY, start, end - start, [0], pack_ids(IDS[start:end]))
    if not shelf.begin("p", epoch, batch, [item]):
        return False
    assert shelf.make_room("p", item, 0.0) is not None
    shelf.commit(item, np.zeros((1, end - start), dtype=np.uint64))
    return True


def num_held(shelf: Shelf) -> int:
    found = shelf.locate(KEY, pack_ids(IDS), 0.0)
    return 0 if found is None else found[1]


def shelf_after_two_batches() -> Shelf:
    shelf = Shelf(8, 8)
    shelf.standing = 1
    assert shelf.claim("p", 10, 0, 60.0) == []
    assert read(shelf, 10, 1, 0, 5) and read(shelf, 10, 2, 5, 9)
    return shelf


def test_whose_driver_goes_on_has_lost_nothing() -> None:
    """It has a new lease, and the driver never heard of it."""
    shelf = shelf_after_two_batches()
    shelf.standing = 2
    assert num_held(shelf) == 5
    assert read(shelf, 10, 3, 9, 12) and read(shelf, 10, 4, 12, 13)
    assert num_held(shelf) == 13


def test_while_nobody_may_know_us_the_last_batch_is_doubtful() -> None:
    shelf = shelf_after_two_batches()
    shelf.standing = None
    assert num_held(shelf) == 5
    shelf.standing = 1
    assert num_held(shelf) == 9


def test_what_was_read_last_for_a_driver_that_gave_us_up_is_void() -> None:
    shelf = shelf_after_two_batches()
    shelf.standing = 2
    assert shelf.claim("p", 10, 7, 60.0) == [KEY]
    assert num_held(shelf) == 5
    assert not read(shelf, 10, 3, 5, 9), "it was on its way when the driver gave us up"
    assert read(shelf, 10, 8, 5, 9)
    assert num_held(shelf) == 9


def test_a_new_epoch_voids_nothing_of_who_was_known_all_the_time() -> None:
    shelf = shelf_after_two_batches()
    assert shelf.claim("p", 11, 0, 60.0) == [KEY]
    assert num_held(shelf) == 9
    assert shelf.claim("p", 11, 0, 60.0) == [KEY], "said again, by a stage that leaves"
    assert num_held(shelf) == 9
    assert not read(shelf, 10, 3, 9, 12)
    shelf.standing = 2
    assert shelf.claim("p", 11, 1, 60.0) == [KEY], "as its driver gave us up"
    assert num_held(shelf) == 9, "who asked for that before is long over"


def test_a_new_epoch_after_a_lapse_has_all_but_the_last_batch() -> None:
    shelf = shelf_after_two_batches()
    shelf.standing = 2
    assert read(shelf, 10, 3, 9, 12), "sent to one that may have been given up since"
    assert shelf.claim("p", 11, 0, 60.0) == [KEY]
    assert num_held(shelf) == 9


def copy_of(placed: Placed, start: int, end: int) -> ReplicaItem:
    return ReplicaItem(KEY, start, end - start, [0], pack_ids(IDS[start:end]), placed)


def kept(shelf: Shelf, pipeline: str, item: ReplicaItem) -> bool:
    if shelf.make_room(pipeline, item, 0.0) is None:
        return False
    shelf.commit(item, np.zeros((1, item.num_tokens), dtype=np.uint64))
    return True


def test_a_sequence_belongs_to_the_pipeline_that_it_was_given_to_last() -> None:
    """Whatever comes first: what the one before has sent may have been on its way for long."""
    shelf = Shelf(8, 8)
    assert kept(shelf, "new", copy_of((5, 2), 0, 9))
    assert not kept(shelf, "old", copy_of((5, 1), 0, 12)), "the same router had given it away before"
    assert not kept(shelf, "old", copy_of((4, 7), 0, 12)), "the router before had"
    shelf.take_over("old", KEY, (5, 1))
    shelf.ended("old", KEY)
    assert num_held(shelf) == 9 and kept(shelf, "new", copy_of((5, 2), 9, 12))
    assert kept(shelf, "newest", copy_of((6, 1), 0, 3))
    assert num_held(shelf) == 3 and not kept(shelf, "new", copy_of((5, 2), 12, 13))


def test_who_asks_for_it_has_it() -> None:
    shelf = Shelf(8, 8)
    assert kept(shelf, "old", copy_of((5, 1), 0, 9))
    shelf.take_over("new", KEY, (5, 2))
    assert not kept(shelf, "old", copy_of((5, 1), 9, 12))
    assert kept(shelf, "new", copy_of((5, 2), 9, 12))
    assert num_held(shelf) == 12
