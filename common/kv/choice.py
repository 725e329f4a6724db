"""Which link two sides use, decided from what each of them has."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from common.kv.offer import GrantOffer

LINK_NAMES = ("shm", "cuda_ipc", "nixl", "zmq")
"""The links between processes, the best first."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a writer has: the host it runs on ("" where that cannot be told), the GPUs that it sees (their ids) and
    whether the transfer library is installed."""

    host_id: str
    gpu_ids: frozenset[str] = frozenset()
    has_nixl: bool = False


def choose_links(ours: Capabilities, offer: GrantOffer) -> list[str]:
    """Names of the links that can work, the best first. The last one is always ZeroMQ; those before may yet turn out to
    be impossible, as sockets of another network namespace are."""
    is_near = offer.memory_address is not None and ours.host_id == offer.host_id != ""
    possible = {
        "shm": is_near and offer.gpu_id is None,
        "cuda_ipc": is_near and offer.gpu_id in ours.gpu_ids,
        "nixl": ours.has_nixl and offer.has_nixl,
        "zmq": True,
    }
    return [name for name in LINK_NAMES if possible[name]]


def restricted(offer: GrantOffer, link: str) -> GrantOffer:
    """The offer of an owner that knows only `link` ("auto": whatever it knows) and the fallback."""
    shared = "shm" if offer.gpu_id is None else "cuda_ipc"
    return msgspec.structs.replace(
        offer,
        memory_address=offer.memory_address if link in ("auto", shared) else None,
        has_nixl=offer.has_nixl and link in ("auto", "nixl"),
    )
