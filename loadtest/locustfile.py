"""Locust users that speak ZeroMQ: `locust -f loadtest/locustfile.py --headless -u 16 -r 4 -t 60s`.

Each user sends prompts one after the other over its own connection. Besides whole requests ("generate"), the table
shows the time to the first token ("TTFT") and the mean time per further token ("TPOT"), in milliseconds; response sizes
count tokens. The system is the one at `--host tcp://...`, else where any client looks for it.
"""

from __future__ import annotations

import random
import secrets
import time
from dataclasses import dataclass
from typing import Any

import gevent
import zmq.green as zmq
from locust import User, constant, events, task
from locust.exception import StopUser

from dejavu import wire
from dejavu.endpoints import find_endpoints
from dejavu.errors import DejavuError, RequestFailed, Unavailable, error_from_wire
from dejavu.keys import protect_client
from dejavu.params import SamplingParams

CONNECT_LIMIT_MS = 3_000
SILENCE_LIMIT_MS = 30_000
PROMPTS = (
    "It was a fine morning, and",
    "She had never in her life",
    "The letter was from her sister, who",
    "There is no happiness like that of",
)


@dataclass(frozen=True, slots=True)
class Timings:
    """One finished request, in seconds since it was sent."""

    first_s: float
    last_s: float
    num_tokens: int


class ZmqConnection:
    """A client for gevent: one DEALER, one request at a time. Raises `Unavailable` where no router answers."""

    def __init__(self, endpoint: str) -> None:
        self._socket: Any = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, secrets.token_hex(8).encode())
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.RCVTIMEO, int(wire.PING_INTERVAL_S * 1000))
        protect_client(self._socket, endpoint)
        self._socket.connect(endpoint)
        self._send(wire.Hello(wire.PROTOCOL_VERSION))
        if not self._socket.poll(CONNECT_LIMIT_MS):
            self.close()
            raise Unavailable(f"nobody answers at {endpoint}")

    def generate(self, prompt: str, params: SamplingParams) -> Timings:
        """Runs one request to its end. Raises `DejavuError`."""
        request_id = secrets.token_hex(12)
        sent_s = time.monotonic()
        self._send(wire.Submit(request_id, prompt, params))
        times: list[float] = []
        silent_since_s = sent_s
        while True:
            message = self._receive()
            if message is None:
                if (time.monotonic() - silent_since_s) * 1000 > SILENCE_LIMIT_MS:
                    raise Unavailable("the router is silent")
                continue
            silent_since_s = time.monotonic()
            match message:
                case wire.Tokens(frames):
                    times += [silent_since_s - sent_s for frame in frames if frame.request_id == request_id]
                case wire.Ended(ended_id, outcome, _, _, error) if ended_id == request_id:
                    if error is not None:
                        raise error_from_wire(error.code, error.message, error.field, error.details)
                    if outcome != "finished" or not times:
                        raise RequestFailed(f"ended as {outcome}")
                    return Timings(times[0], times[-1], len(times))

    def close(self) -> None:
        self._socket.close()

    def _send(self, message: wire.ClientMessage) -> None:
        self._socket.send(wire.encode(message))

    def _receive(self) -> wire.RouterMessage | None:
        """The next message; None after a silence, in which a ping went out."""
        try:
            return wire.decode_router_message(self._socket.recv())
        except zmq.Again:
            self._send(wire.Ping())
            return None


@events.init.add_listener  # type: ignore[untyped-decorator]
def set_clock(**_: Any) -> None:
    """gevent counts from its loop's last look at the clock, which was before everything was imported: without this a
    slow machine's --run-time is over too early."""
    gevent.get_hub().loop.update_now()


class StreamingUser(User):  # type: ignore[misc]
    """Asks for completions without a pause."""

    wait_time = constant(0)

    def on_start(self) -> None:
        endpoint = find_endpoints(self.host or None)[0]
        try:
            self._connection = ZmqConnection(endpoint)
        except Unavailable as error:
            self._report("connect", CONNECT_LIMIT_MS / 1000, 0, error)
            raise StopUser from error

    def on_stop(self) -> None:
        self._connection.close()

    @task  # type: ignore[untyped-decorator]
    def complete(self) -> None:
        params = SamplingParams(
            max_tokens=random.choice((16, 32, 64)),
            temperature=0.8,
            seed=secrets.randbits(63),
            ignore_eos=True,
        )
        started_s = time.monotonic()
        try:
            timings = self._connection.generate(random.choice(PROMPTS), params)
        except DejavuError as error:
            self._report("generate", time.monotonic() - started_s, 0, error)
            return
        self._report("generate", timings.last_s, timings.num_tokens, None)
        self._report("TTFT", timings.first_s, 1, None)
        if timings.num_tokens > 1:
            tpot_s = (timings.last_s - timings.first_s) / (timings.num_tokens - 1)
            self._report("TPOT", tpot_s, timings.num_tokens, None)

    def _report(self, name: str, time_s: float, num_tokens: int, error: Any) -> None:
        self.environment.events.request.fire(
            request_type="ZMQ", name=name, response_time=time_s * 1000, response_length=num_tokens, exception=error,
            context={},
        )  # fmt: skip
