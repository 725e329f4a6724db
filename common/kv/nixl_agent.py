"""NVIDIA's transfer library (NIXL), as far as a link needs it: agents, registered memory, transfers.

It is an optional extra. Its UCX backend takes what both sides have: InfiniBand, RoCE, GPU-direct, shared memory, TCP.
Two of its properties shape what is here. Withdrawing a registration does not stop a peer that knows the address, so
memory that was granted stays mapped until every writer has left. And a transfer to a frozen peer never ends, so whoever
gives one up leaves it, and the memory it may touch, in the agent's keeping until it has ended."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import secrets
import threading
from collections import Counter
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.kv.errors import LinkLost
from common.kv.geometry import FEW_PIECES, CopyPlan, Int64
from common.kv.offer import NixlMemory
from common.kv.pool import KvPool, retire

_MODULES = ("nixl_cu13", "nixl_cu12")
_MAX_PAUSE_US = 100_000


def nixl_module() -> str | None:
    """The installed variant; None: there is none."""
    return next((name for name in _MODULES if importlib.util.find_spec(name) is not None), None)


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that is registered with an agent."""

    memory: torch.Tensor
    handle: Any
    address: int
    device_id: int
    is_device: bool

    @classmethod
    def of(cls, memory: torch.Tensor, handle: Any) -> Region:
        """PyTorch takes microseconds to say each of these things, and a small transfer does not take many."""
        return cls(memory, handle, memory.data_ptr(), max(memory.get_device(), 0), memory.is_cuda)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A request on its way, with the region of ours that it may touch."""

    handle: Any
    region: Region
    is_write: bool
    state: str
    """what the library said when it began"""


class NixlAgent:
    """May be called from several threads. Raises `LinkLost` for whatever the library does not like."""

    def __init__(self, name: str) -> None:
        module = nixl_module()
        if module is None:
            raise LinkLost("the NIXL library is not installed")
        library, bindings = importlib.import_module(f"{module}._api"), importlib.import_module(f"{module}._bindings")
        self._typed_errors = _TypedErrors(_error_types(bindings))
        vars(library)["nixlBind"] = _with_patience(bindings)
        _calm(logging.getLogger("nixl"))
        config = library.nixl_agent_config(
            backends=["UCX"], sync_mode=library.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        self.name = f"{name}-{secrets.token_hex(8)}"
        self._lock = threading.Lock()
        self._peers: Counter[str] = Counter()
        self._regions: dict[int, tuple[Region, int]] = {}
        self._left: list[Transfer] = []
        with self._typed_errors:
            self._agent: Any = library.nixl_agent(self.name, config)

    @property
    def metadata(self) -> bytes:
        """What a peer needs to reach the memory that is registered so far."""
        with self._typed_errors:
            metadata = self._agent.get_agent_metadata()
        assert isinstance(metadata, bytes)
        return metadata

    def register(self, memory: torch.Tensor) -> Region:
        """Once per piece of memory, however many links use it; each `unregister`s it once."""
        with self._lock, self._typed_errors:
            known = self._regions.get(memory.data_ptr())
            region = known[0] if known else Region.of(memory, self._agent.register_memory(memory))
            self._regions[region.address] = (region, known[1] + 1 if known else 1)
        return region

    def unregister(self, region: Region) -> None:
        """Not as long as a transfer that was left may touch it: then it stays registered."""
        with self._lock, self._typed_errors:
            self._sweep()
            _, num_users = self._regions[region.address]
            is_touched = any(left.region.address == region.address for left in self._left)
            if num_users > 1 or is_touched:
                self._regions[region.address] = (region, max(1, num_users - 1))
                return
            del self._regions[region.address]
            self._agent.deregister_memory(region.handle)

    def add_peer(self, metadata: bytes) -> str:
        """The peer's name from now on. Several links may add the same one."""
        with self._lock, self._typed_errors:
            name = self._agent.add_remote_agent(metadata)
            text = name.decode() if isinstance(name, bytes) else str(name)
            self._peers[text] += 1
        return text

    def remove_peer(self, name: str) -> None:
        with self._lock, self._typed_errors:
            self._peers[name] -= 1
            if self._peers[name] <= 0:
                del self._peers[name]
                self._agent.remove_remote_agent(name)

    def start(self, peer: str, local: Region, remote: NixlMemory, plan: CopyPlan, *, is_write: bool) -> Transfer:
        """Begins to move pieces, by `plan` from `local` to `remote` or (not `is_write`) the other way. Where the peer
        is on this host they may have moved when this returns."""
        sides = (plan.source_offset, plan.destination_offset)
        own_offsets, their_offsets = sides if is_write else sides[::-1]
        ours = _pieces(local.address, local.device_id, own_offsets, plan.num_bytes)
        theirs = _pieces(remote.address, remote.device_id, their_offsets, plan.num_bytes)
        with self._typed_errors:
            handle = self._agent.initialize_xfer(
                "WRITE" if is_write else "READ",
                self._agent.get_xfer_descs(ours, _kind(local.is_device)),
                self._agent.get_xfer_descs(theirs, _kind(remote.is_device)),
                peer,
            )
            state = self._agent.transfer(handle)
        return Transfer(handle, local, is_write, state)

    def is_over(self, transfer: Transfer) -> bool:
        """Whether the bytes are there. Raises `LinkLost` where they never will be; then it has ended, too."""
        state = transfer.state
        if state == "PROC":
            with self._typed_errors:
                state = self._agent.check_xfer_state(transfer.handle)
        if state == "PROC":
            return False
        transfer.handle.release()
        if state != "DONE":
            raise LinkLost("the transfer failed")
        return True

    def leave(self, transfer: Transfer) -> None:
        """Nobody will ask for it any more, but it has not ended."""
        with self._lock:
            self._left.append(transfer)

    def _sweep(self) -> None:
        still = []
        for transfer in self._left:
            try:
                if not self.is_over(transfer):
                    still.append(transfer)
            except LinkLost:
                continue
        self._left = still


class _TypedErrors:
    """Makes `LinkLost` of the library's errors; a generator would take as long as a call of the library."""

    def __init__(self, types: tuple[type[Exception], ...]) -> None:
        self._types = types

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, self._types):
            raise LinkLost(f"NIXL: {type(error).__name__} {error}") from error


class NixlGrant:
    """An owner's pool, registered with an agent of its own, for peers to write to."""

    def __init__(self, pool: KvPool) -> None:
        self._agent: NixlAgent | None = NixlAgent(pool.name)
        self._pool = pool
        self._region = self._agent.register(pool.arena)
        self.memory = NixlMemory(
            self._agent.metadata, pool.arena.data_ptr(), max(pool.arena.get_device(), 0), pool.arena.is_cuda
        )

    def close(self, has_writers: bool) -> None:
        """`has_writers`: somebody was let in and has not left, so the memory has to stay where it is for good."""
        if self._agent is not None:
            if has_writers:
                retire(self._pool)
            self._agent.unregister(self._region)
            self._agent = None


_initiator: NixlAgent | None = None
_initiator_lock = threading.Lock()


def initiator() -> NixlAgent:
    """The agent of all links that begin in this process; it takes a second to make."""
    global _initiator
    with _initiator_lock:
        if _initiator is None:
            _initiator = NixlAgent(f"writer-{os.getpid()}")
        return _initiator


def _pieces(
    address: int, device_id: int, offsets: Int64, num_bytes: Int64
) -> npt.NDArray[np.uint64] | list[tuple[int, int, int]]:
    """(address, size, device) of each piece, as the library wants them."""
    if len(offsets) < FEW_PIECES:
        few = zip(offsets.tolist(), num_bytes.tolist(), strict=True)
        return [(address + offset, size, device_id) for offset, size in few]
    pieces = np.empty((len(offsets), 3), dtype=np.uint64)
    pieces[:, 0] = offsets
    pieces[:, 0] += np.uint64(address)
    pieces[:, 1] = num_bytes
    pieces[:, 2] = device_id
    return pieces


def _kind(is_device: bool) -> str:
    return "VRAM" if is_device else "DRAM"


def _with_patience(bindings: ModuleType) -> SimpleNamespace:
    """The library's Python side has each agent's thread look for work without a pause: a core of every process that
    has a pool or a link, for as long as it lives. The thread can wait, and is woken by what it waits for."""

    class PatientConfig(bindings.nixlAgentConfig):  # type: ignore[misc, name-defined]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, _MAX_PAUSE_US if name == "pthrDelay" else value)

    return SimpleNamespace(**{**vars(bindings), "nixlAgentConfig": PatientConfig})


def _error_types(bindings: object) -> tuple[type[Exception], ...]:
    """The library's errors have no class in common."""
    known = [getattr(bindings, name) for name in dir(bindings) if name.startswith("nixl") and name.endswith("Error")]
    return tuple(one for one in known if isinstance(one, type) and issubclass(one, Exception))


def _calm(logger: logging.Logger) -> None:
    """It would write to stdout, which is not its own."""
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
