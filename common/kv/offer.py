"""What the owner of a pool offers, and what both sides say before a link exists."""

from __future__ import annotations

import hmac
from pathlib import Path

import msgspec

from common.kv.errors import LinkRefused
from common.kv.fence import Fence
from common.kv.layout import PoolLayout
from dejavu.errors import ProtocolError

PROTOCOL_VERSION = 3
"""Changes whenever two ends would no longer understand each other; the checksum and the memory order count
too."""


class GrantOffer(msgspec.Struct, frozen=True):
    """A pool that others may write to: what it looks like and where it can be had. Who has the offer has its
    `token`, so it travels like a key."""

    name: str
    incarnation: str
    layout: PoolLayout
    host_id: str
    zmq_endpoint: str
    token: bytes
    memory_address: str | None = None
    """Abstract Unix socket (without the leading NUL) that hands out the memory; None: it cannot be shared."""
    gpu_id: str | None = None
    """The GPU whose memory the pool is; None: it is host memory."""
    has_nixl: bool = False
    """The pool is registered with the transfer library."""
    protocol: int = PROTOCOL_VERSION

    def encode(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> GrantOffer:
        """Inverse of `encode`. Raises `ProtocolError`."""
        try:
            return _OFFER.decode(text)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"no valid offer of a KV pool: {error}") from error


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """First message of a writer; `layout` is that of the pool it writes from."""

    protocol: int
    token: bytes
    name: str
    layout: PoolLayout
    link: str
    """Name of the link that the writer wants."""
    authority: dict[str, int] = {}
    """Under which epochs it writes (`fence.Authority`)."""


class NixlMemory(msgspec.Struct, frozen=True, array_like=True):
    """Where an owner's pool lies, for the transfer library; `metadata` is that of the owner's agent."""

    metadata: bytes
    address: int
    device_id: int
    is_device: bool


class CudaMemory(msgspec.Struct, frozen=True, array_like=True):
    """Memory of a GPU that other processes can open: the driver's handle of an allocation, and where in it the pool
    begins."""

    handle: bytes
    offset: int
    gpu_id: str


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """The owner lets the writer in. The memory comes along where it can be shared."""

    incarnation: str
    layout: PoolLayout
    nixl: NixlMemory | None = None
    cuda: CudaMemory | None = None


class Leave(msgspec.Struct, frozen=True, array_like=True, tag="leave"):
    """Nothing of this writer is on its way any more, and nothing will be."""


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    reason: str


# here, not where they are used: msgspec crashes where two threads are the first to decode a type
HELLO = msgspec.msgpack.Decoder(Hello)
_OFFER = msgspec.json.Decoder(GrantOffer)
_ANSWER: msgspec.msgpack.Decoder[Welcome | Refusal] = msgspec.msgpack.Decoder(Welcome | Refusal)


def host_id() -> str:
    """The same for all processes of one boot of one machine, containers included."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def misfit(writer_name: str, writer: PoolLayout, owner_name: str, owner: PoolLayout) -> str | None:
    """Why KV cannot move from one pool to the other, naming both sides; None: it can."""
    pairs = {
        "model": (writer.fingerprint, owner.fingerprint),
        "dtype": (writer.dtype, owner.dtype),
        "head_dim": (writer.head_dim, owner.head_dim),
    }
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            return f"{what} of {writer_name} is {ours}, of {owner_name} it is {theirs}"
    if max(writer.first_head, owner.first_head) >= min(writer.heads[1], owner.heads[1]):
        return f"{writer_name} has the KV heads {writer.heads}, {owner_name} has {owner.heads}"
    return None


def judge(hello: Hello, offer: GrantOffer, fence: Fence) -> Welcome | Refusal:
    """The owner's answer to a writer."""
    if hello.protocol != offer.protocol:
        return Refusal(f"{hello.name} speaks KV protocol {hello.protocol}, {offer.name} speaks {offer.protocol}")
    if not hmac.compare_digest(hello.token, offer.token):
        return Refusal(f"{hello.name} does not have the token of {offer.name}")
    if fence.stops(hello.authority):
        return Refusal(f"{hello.name} would write to {offer.name} under an epoch that is over")
    reason = misfit(hello.name, hello.layout, offer.name, offer.layout)
    return Welcome(offer.incarnation, offer.layout) if reason is None else Refusal(reason)


def check_answer(frame: bytes | memoryview, offer: GrantOffer) -> Welcome:
    """The writer's look at the owner's answer. Raises `LinkRefused`."""
    try:
        answer = _ANSWER.decode(frame)
    except msgspec.DecodeError as error:
        raise LinkRefused(f"{offer.name} gave no valid answer: {error}") from error
    if isinstance(answer, Refusal):
        raise LinkRefused(answer.reason)
    if (answer.incarnation, answer.layout) != (offer.incarnation, offer.layout):
        raise LinkRefused(f"{offer.name} is not what it offered: it was replaced, or its pool was")
    return answer
