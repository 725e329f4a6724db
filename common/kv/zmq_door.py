"""The owner's side of a ZeroMQ link: what writers send is copied into the pool and acknowledged, what they ask for is
sent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from common.keys import HANDSHAKE_MS, protect_server
from common.kv.copies import check_pieces
from common.kv.fence import Authority, Fence
from common.kv.offer import GrantOffer, Hello, Leave, NixlMemory, Refusal, Welcome, judge
from common.kv.pool import Bytes, KvPool
from common.kv.zmq_messages import (
    MAX_IN_FLIGHT,
    MAX_MESSAGE_BYTES,
    Done,
    Read,
    Write,
    from_frames,
    into,
    pieces_of,
    to_frames,
)

if TYPE_CHECKING:
    from common.kv.device_door import DeviceDoor

_MESSAGE: msgspec.msgpack.Decoder[Hello | Leave | Write | Read] = msgspec.msgpack.Decoder(Hello | Leave | Write | Read)
_MAX_WRITERS = 1024
_MAX_MESSAGES_AT_ONCE = 16


class ZmqDoor:
    """A ROUTER for one pool. Never blocks; the caller polls `socket`. Who wants the transfer library gets `nixl`."""

    def __init__(self, pool: KvPool, fence: Fence, host: str, port: int, nixl: NixlMemory | None = None) -> None:
        self._pool = pool
        self._fence = fence
        self._device = _device_door(pool)
        self._nixl = nixl
        self._writers: OrderedDict[bytes, Hello] = OrderedDict()
        self._one_sided: dict[bytes, Authority] = {}
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 2 * MAX_IN_FLIGHT)
        # a ROUTER drops what is beyond this, and hears that answers were read only after half of it, and between polls:
        # so it has to be more than twice what is answered at once. Who does not read its answers is not waited for
        self.socket.setsockopt(zmq.SNDHWM, 4 * _MAX_MESSAGES_AT_ONCE)
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        address = f"tcp://{host}:{port or '*'}"
        protect_server(self.socket, address)
        try:
            self.socket.bind(address)
        except zmq.ZMQError:
            self.socket.close()
            raise
        self.endpoint: str = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def on_readable(self, offer: GrantOffer) -> None:
        """Serves what has arrived, but not so much that others starve."""
        for _ in range(_MAX_MESSAGES_AT_ONCE):
            try:
                writer, *frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            answer, payload = self._serve(writer.bytes, [frame.buffer for frame in frames], offer)
            # a writer that is gone is no error: a ROUTER drops what it cannot deliver
            parts: list[Any] = [writer.bytes, msgspec.msgpack.encode(answer), *payload]
            self.socket.send_multipart(parts, zmq.NOBLOCK, copy=False)

    @property
    def peers(self) -> list[Hello]:
        """Who was let in and has neither said that it left nor been buried; from any thread."""
        return list({hello.name: hello for hello in list(self._writers.values())}.values())

    @property
    def has_one_sided_writers(self) -> bool:
        """Somebody may write to the pool without asking."""
        return bool(self._one_sided)

    def shut_out(self) -> None:
        """Whatever the writers that the fence stops have sent, or will send, is refused from now on; those who write
        without asking are told to leave."""
        for writer in [writer for writer, hello in self._writers.items() if self._fence.stops(hello.authority)]:
            del self._writers[writer]
        goodbye = msgspec.msgpack.encode(Refusal(f"{self._pool.name} wants no writers of an epoch that is over"))
        for writer in [writer for writer, authority in self._one_sided.items() if self._fence.stops(authority)]:
            self.socket.send_multipart([writer, goodbye], zmq.NOBLOCK)

    def bury(self, name: str) -> None:
        """Whoever names this in its authority is dead."""
        for writer in [writer for writer, authority in self._one_sided.items() if name in authority]:
            del self._one_sided[writer]
        for writer in [writer for writer, hello in self._writers.items() if name in hello.authority]:
            del self._writers[writer]

    def is_clear(self, fence: Fence) -> bool:
        """Whether nobody whom this fence stops may still write; one-sided writers cannot be refused."""
        return not any(fence.stops(authority) for authority in self._one_sided.values())

    def close(self) -> None:
        self.socket.close(linger=0)

    def _serve(
        self, writer: bytes, frames: Sequence[memoryview], offer: GrantOffer
    ) -> tuple[Welcome | Done | Refusal, list[Bytes]]:
        try:
            message = _MESSAGE.decode(frames[0])
            if isinstance(message, Hello):
                return self._let_in(writer, message, offer), []
            if isinstance(message, Leave):
                self._one_sided.pop(writer, None)
                self._writers.pop(writer, None)
                return Done(0), []
            if writer not in self._writers:
                return Refusal(f"{offer.name} does not know this writer"), []
            return Done(message.number), self._carry_out(message, frames[1:])
        except (msgspec.DecodeError, ValueError, IndexError) as error:
            return Refusal(f"{offer.name} cannot make sense of a message: {error}"), []

    def _let_in(self, writer: bytes, hello: Hello, offer: GrantOffer) -> Welcome | Refusal:
        answer = judge(hello, offer, self._fence)
        if isinstance(answer, Refusal):
            return answer
        self._writers[writer] = hello
        if len(self._writers) > _MAX_WRITERS:
            self._writers.popitem(last=False)
        if hello.link != "nixl":
            return answer
        self._one_sided[writer] = hello.authority
        return msgspec.structs.replace(answer, nixl=self._nixl)

    def _carry_out(self, request: Write | Read, payload: Sequence[memoryview]) -> list[Bytes]:
        offsets, num_bytes = pieces_of(request)
        check_pieces(offsets, num_bytes, self._pool.layout.total_bytes)
        if isinstance(request, Write):
            from_frames(
                payload, offsets, num_bytes, into(self._pool.memory) if self._device is None else self._device.put
            )
            return []
        if num_bytes.sum() > MAX_MESSAGE_BYTES:
            raise ValueError(f"{num_bytes.sum()} bytes asked for at once")
        if self._device is None:
            return to_frames(self._pool.memory, offsets, num_bytes)
        return [self._device.take(offsets, num_bytes)]


def _device_door(pool: KvPool) -> DeviceDoor | None:
    if pool.is_host:
        return None  # and torch need not be loaded
    from common.kv.device_door import DeviceDoor

    return DeviceDoor(pool)
