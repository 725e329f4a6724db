"""Which link is chosen, from what both sides have."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from common.kv.choice import LINK_NAMES, Capabilities, choose_links, restricted
from common.kv.offer import GrantOffer
from tests.unit.kv.reference import layout

HOST_POOL = GrantOffer(
    "token-0-0", "first", layout(), "here", "tcp://10.0.0.1:1", b"key", memory_address="socket", has_nixl=True
)
GPU_POOL = msgspec.structs.replace(HOST_POOL, gpu_id="GPU-1")
EVERYTHING = Capabilities("here", frozenset({"GPU-0", "GPU-1"}), has_nixl=True)


@pytest.mark.parametrize(
    ("ours", "offer", "chosen"),
    [
        (EVERYTHING, HOST_POOL, ["shm", "nixl", "zmq"]),
        (EVERYTHING, GPU_POOL, ["cuda_ipc", "nixl", "zmq"]),
        (Capabilities("here"), HOST_POOL, ["shm", "zmq"]),
        (Capabilities("here"), GPU_POOL, ["zmq"]),
        (Capabilities("here", frozenset({"GPU-0"})), GPU_POOL, ["zmq"]),
        (Capabilities("there", frozenset({"GPU-1"}), has_nixl=True), GPU_POOL, ["nixl", "zmq"]),
        (Capabilities("there", has_nixl=True), HOST_POOL, ["nixl", "zmq"]),
        (Capabilities("there"), HOST_POOL, ["zmq"]),
        # a host that cannot be told apart is no host in common
        (Capabilities(""), msgspec.structs.replace(HOST_POOL, host_id=""), ["zmq"]),
        (EVERYTHING, msgspec.structs.replace(HOST_POOL, memory_address=None), ["nixl", "zmq"]),
        (EVERYTHING, msgspec.structs.replace(HOST_POOL, has_nixl=False), ["shm", "zmq"]),
    ],
)
def test_the_best_that_both_have(ours: Capabilities, offer: GrantOffer, chosen: list[str]) -> None:
    assert choose_links(ours, offer) == chosen


def test_one_can_insist() -> None:
    for offer, link in itertools.product([HOST_POOL, GPU_POOL], LINK_NAMES):
        assert set(choose_links(EVERYTHING, restricted(offer, link))) <= {link, "zmq"}
        assert choose_links(EVERYTHING, restricted(offer, "auto")) == choose_links(EVERYTHING, offer)
    assert choose_links(EVERYTHING, restricted(HOST_POOL, "nixl")) == ["nixl", "zmq"]
    assert choose_links(EVERYTHING, restricted(GPU_POOL, "cuda_ipc")) == ["cuda_ipc", "zmq"]
