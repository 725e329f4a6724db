"""The owner's side of a ZeroMQ link: what writers send is copied into the pool and acknowledged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
import zmq

from common.keys import protect_server
from common.kv.copies import check_destination, scatter
from common.kv.geometry import Int64
from common.kv.offer import GrantOffer, Hello, Refusal, Welcome, judge
from common.kv.pool import Bytes, KvPool
from common.kv.zmq_link import MAX_IN_FLIGHT, MAX_MESSAGE_BYTES, Write, Written

_MAX_WRITERS = 1024
_MAX_MESSAGES_AT_ONCE = 16


class ZmqDoor:
    """A ROUTER for one pool. Never blocks; the caller polls `socket`."""

    def __init__(self, pool: KvPool, host: str) -> None:
        self._pool = pool
        self._writers: OrderedDict[bytes, None] = OrderedDict()
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, 2 * MAX_IN_FLIGHT)
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_MESSAGE_BYTES)
        address = f"tcp://{host}:*"
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
            answer = self._serve(writer.bytes, [frame.buffer for frame in frames], offer)
            # a writer that is gone is no error: a ROUTER drops what it cannot deliver
            self.socket.send_multipart([writer.bytes, msgspec.msgpack.encode(answer)], zmq.NOBLOCK)

    def close(self) -> None:
        self.socket.close(linger=0)

    def _serve(self, writer: bytes, frames: Sequence[memoryview], offer: GrantOffer) -> Welcome | Written | Refusal:
        try:
            message = msgspec.msgpack.decode(frames[0], type=Hello | Write)
            if isinstance(message, Hello):
                return self._let_in(writer, message, offer)
            if writer not in self._writers:
                return Refusal(f"{offer.name} does not know this writer")
            self._store(message, [np.frombuffer(frame, dtype=np.uint8) for frame in frames[1:]])
        except (msgspec.DecodeError, ValueError, IndexError) as error:
            return Refusal(f"{offer.name} cannot make sense of a message: {error}")
        return Written(message.number)

    def _let_in(self, writer: bytes, hello: Hello, offer: GrantOffer) -> Welcome | Refusal:
        answer = judge(hello, offer)
        if isinstance(answer, Welcome):
            self._writers[writer] = None
            if len(self._writers) > _MAX_WRITERS:
                self._writers.popitem(last=False)
        return answer

    def _store(self, message: Write, payload: Sequence[Bytes]) -> None:
        offsets = np.frombuffer(message.offsets, dtype="<i8")
        num_bytes = np.frombuffer(message.num_bytes, dtype="<i8")
        if len(offsets) != len(num_bytes):
            raise ValueError(f"{len(offsets)} offsets for {len(num_bytes)} pieces")
        check_destination(offsets, num_bytes, self._pool.layout.total_bytes)
        sizes = [int(num_bytes.sum())] if len(payload) == 1 else num_bytes.tolist()
        if [len(frame) for frame in payload] != sizes:
            raise ValueError(f"{[len(frame) for frame in payload]} bytes sent for pieces of {sizes}")
        if len(payload) == 1:
            self._copy(payload[0], offsets, num_bytes)
        else:
            for frame, index in zip(payload, range(len(offsets)), strict=True):
                self._copy(frame, offsets[index : index + 1], num_bytes[index : index + 1])

    def _copy(self, payload: Bytes, offsets: Int64, num_bytes: Int64) -> None:
        if self._pool.device.type == "cpu":
            scatter(payload, offsets, num_bytes, self._pool.memory)
            return
        first = 0
        for offset, size in zip(offsets.tolist(), num_bytes.tolist(), strict=True):
            piece = torch.from_numpy(payload[first : first + size].copy())
            self._pool.arena[offset : offset + size].copy_(piece)
            first += size
        torch.cuda.synchronize(self._pool.device)
