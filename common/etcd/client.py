"""Reads, writes, transactions and watches on etcd, with a deadline for every call."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import socket
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Self
from urllib.parse import urlsplit

import grpc
import grpc.aio

from common.etcd.errors import (
    EtcdCompacted,
    EtcdError,
    EtcdLeaseNotFound,
    EtcdRequestFailed,
    EtcdUnavailable,
)
from common.etcd.shim import load_etcdrpc
from dejavu.errors import ConfigurationError

rpc = load_etcdrpc()

CALL_DEADLINE_S = 3.0
"""long enough to ride over the election of a new leader among etcd's own nodes"""
MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0
METADATA = (("hasleader", "true"),)
"""a node that is cut off from its cluster then ends our watches instead of falling silent"""
CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # how long one attempt to connect may take
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.lb_policy_name", "round_robin"),
    # a frozen node must not silence a watch for ever; etcd refuses pings closer than 5 s
    ("grpc.keepalive_time_ms", 7000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
TRANSIENT = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        # what a connection that breaks in the middle of a stream may look like
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.CANCELLED,
    }
)


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key, its value, and the revisions at which it was created and last written."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """A key was written (`put`) or is gone (`delete`: value empty, lease 0) as of `mod_revision`."""

    kind: Literal["put", "delete"]
    key: str
    value: bytes
    mod_revision: int
    lease_id: int


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """Whether all compares held, and etcd's revision afterwards (that of the writes, if there were any)."""

    succeeded: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction. Made by `is_absent` and `has_mod_revision`."""

    key: str
    target: Literal["create", "mod"]
    expected: int


@dataclass(frozen=True, slots=True)
class Put:
    """Writes a key; with a lease, it vanishes when the lease ends."""

    key: str
    value: bytes
    lease_id: int = 0


def is_absent(key: str) -> Compare:
    return Compare(key, "create", 0)


def has_mod_revision(key: str, revision: int) -> Compare:
    return Compare(key, "mod", revision)


def backoff_s() -> Iterator[float]:
    """Pauses between attempts: 0.05 s doubling to 1 s, each shortened at random by up to a half."""
    for exponent in itertools.count():
        yield min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2 ** min(exponent, 10)) * random.uniform(0.5, 1.0)


class EtcdClient:
    """Use as `async with EtcdClient("http://127.0.0.1:2379") as client`; several urls as a comma list.

    Every call retries while etcd is unavailable, up to its deadline, then raises `EtcdUnavailable`. So a
    write may be applied twice: transactions must bear that (those of membership and election do).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._addresses = [_address(part) for part in url.split(",")]
        self._channel: Any
        self._kv: Any
        self._lease: Any
        self._watch: Any

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(await self._target(), options=CHANNEL_OPTIONS)
        self._kv = rpc.KVStub(self._channel)
        self._lease = rpc.LeaseStub(self._channel)
        self._watch = rpc.WatchStub(self._channel)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._channel.close()

    async def _target(self) -> str:
        if len(self._addresses) == 1:
            return "dns:///{}:{}".format(*self._addresses[0])
        loop = asyncio.get_running_loop()
        resolved = []
        for host, port in self._addresses:
            try:
                found = await loop.getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
            except socket.gaierror as error:
                raise EtcdUnavailable(self.url, f"cannot resolve {host}: {error.strerror}") from error
            resolved.append("{}:{}".format(*found[0][4][:2]))
        return "ipv4:" + ",".join(resolved)

    # ------------------------------------------------------------ keys

    async def get(self, key: str, deadline_s: float = CALL_DEADLINE_S) -> KeyValue | None:
        """The key as it is now, or None."""
        response = await self._call(self._kv.Range, rpc.RangeRequest(key=key.encode()), deadline_s)
        return _key_value(response.kvs[0]) if response.kvs else None

    async def get_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        """All keys that start with `prefix`, and the revision as of which the list is complete."""
        request = rpc.RangeRequest(key=prefix.encode(), range_end=_range_end(prefix))
        response = await self._call(self._kv.Range, request)
        return [_key_value(found) for found in response.kvs], int(response.header.revision)

    async def put(self, key: str, value: bytes, lease_id: int = 0) -> int:
        """Writes a key and returns the revision. Raises `EtcdLeaseNotFound` for a lease that has ended."""
        request = _put_request(Put(key, value, lease_id))
        return int((await self._call(self._kv.Put, request)).header.revision)

    async def delete(self, key: str) -> None:
        """Removes a key, if it is there."""
        await self._call(self._kv.DeleteRange, rpc.DeleteRangeRequest(key=key.encode()))

    async def transaction(self, compares: Sequence[Compare], puts: Sequence[Put]) -> TransactionResult:
        """Writes all of `puts` if all compares hold, else nothing."""
        request = rpc.TxnRequest(
            compare=[_compare_message(compare) for compare in compares],
            success=[rpc.RequestOp(request_put=_put_request(put)) for put in puts],
        )
        response = await self._call(self._kv.Txn, request)
        return TransactionResult(bool(response.succeeded), int(response.header.revision))

    # ------------------------------------------------------------ leases

    async def grant_lease(self, ttl_s: float) -> tuple[int, float]:
        """A new lease: its id and the time to live that etcd granted (whole seconds, at least as asked)."""
        response = await self._call(self._lease.LeaseGrant, rpc.LeaseGrantRequest(TTL=math.ceil(ttl_s)))
        return int(response.ID), float(response.TTL)

    async def keep_lease(self, lease_id: int, deadline_s: float) -> None:
        """Renews a lease; one attempt. Raises `EtcdLeaseNotFound` when it has ended."""
        call = self._lease.LeaseKeepAlive(timeout=deadline_s, metadata=METADATA)
        try:
            await call.write(rpc.LeaseKeepAliveRequest(ID=lease_id))
            response = await call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise _typed_error(error, self.url) from error
        finally:
            call.cancel()
        if response is grpc.aio.EOF:
            raise EtcdUnavailable(self.url, "the connection ended")
        if response.TTL <= 0:
            raise EtcdLeaseNotFound(f"lease {lease_id:x} has lapsed")

    async def revoke_lease(self, lease_id: int, deadline_s: float = CALL_DEADLINE_S) -> None:
        """Ends a lease; its keys vanish at once."""
        await self._call(self._lease.LeaseRevoke, rpc.LeaseRevokeRequest(ID=lease_id), deadline_s)

    # ------------------------------------------------------------ watches

    async def watch_prefix(self, prefix: str, from_revision: int) -> AsyncGenerator[WatchEvent, None]:
        """Every change under `prefix` from `from_revision` on, in order, once each; ends by `aclose()`.

        Goes on after the last event when etcd comes back. Raises `EtcdCompacted` when that history is gone.
        """
        next_revision = from_revision
        pauses = backoff_s()
        while True:
            try:
                async with aclosing(self._watch_once(prefix, next_revision)) as responses:
                    async for response in responses:
                        pauses = backoff_s()
                        for event in response.events:
                            yield _watch_event(event)
                            next_revision = int(event.kv.mod_revision) + 1
            except EtcdUnavailable:
                await asyncio.sleep(next(pauses))

    async def _watch_once(self, prefix: str, from_revision: int) -> AsyncGenerator[Any, None]:
        """Responses of one watch stream. Raises `EtcdUnavailable` when the stream ends."""
        call = self._watch.Watch(metadata=METADATA)
        request = rpc.WatchCreateRequest(
            key=prefix.encode(), range_end=_range_end(prefix), start_revision=from_revision
        )
        try:
            await call.write(rpc.WatchRequest(create_request=request))
            while (response := await call.read()) is not grpc.aio.EOF:
                # behind what we have seen: another data directory, so the past that we know never happened
                is_replaced = response.created and response.header.revision < from_revision - 1
                if response.compact_revision or is_replaced:
                    raise EtcdCompacted(f"etcd at {self.url} no longer has revision {from_revision}")
                if response.canceled:
                    break
                yield response
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise _typed_error(error, self.url) from error
        finally:
            call.cancel()
        raise EtcdUnavailable(self.url, "the watch ended")

    async def _call(self, method: Any, request: Any, deadline_s: float = CALL_DEADLINE_S) -> Any:
        deadline = time.monotonic() + deadline_s
        for pause_s in backoff_s():
            try:
                return await method(request, timeout=deadline - time.monotonic(), metadata=METADATA)
            except grpc.aio.AioRpcError as error:
                failure = _typed_error(error, self.url)
                if not isinstance(failure, EtcdUnavailable) or time.monotonic() + pause_s >= deadline:
                    raise failure from error
            await asyncio.sleep(pause_s)
        raise AssertionError("backoff_s() never ends")


def _address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url.strip())
        if parts.scheme == "http" and parts.hostname:
            return parts.hostname, parts.port or 2379
    except ValueError:
        pass
    raise ConfigurationError(f"not an address of etcd: {url!r} (expected http://HOST:PORT)", field="etcd")


def _range_end(prefix: str) -> bytes:
    """The first key after all those that start with `prefix`."""
    key = prefix.encode()
    return key[:-1] + bytes([key[-1] + 1])


def _key_value(found: Any) -> KeyValue:
    key = found.key.decode(errors="replace")
    return KeyValue(key, found.value, found.create_revision, found.mod_revision, found.lease)


def _watch_event(event: Any) -> WatchEvent:
    found = _key_value(event.kv)
    # the enumeration Event.EventType: PUT = 0, DELETE = 1
    kind: Literal["put", "delete"] = "delete" if event.type == 1 else "put"
    return WatchEvent(kind, found.key, found.value, found.mod_revision, found.lease_id)


def _compare_message(compare: Compare) -> Any:
    message = rpc.Compare(key=compare.key.encode(), result=rpc.Compare.EQUAL)
    match compare.target:
        case "create":
            message.target, message.create_revision = rpc.Compare.CREATE, compare.expected
        case "mod":
            message.target, message.mod_revision = rpc.Compare.MOD, compare.expected
    return message


def _put_request(put: Put) -> Any:
    return rpc.PutRequest(key=put.key.encode(), value=put.value, lease=put.lease_id)


def _typed_error(error: Any, url: str) -> EtcdError:
    if isinstance(error, asyncio.InvalidStateError):
        return EtcdUnavailable(url, "the connection broke")
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.NOT_FOUND and "lease" in details:
        return EtcdLeaseNotFound(details)
    if code == grpc.StatusCode.OUT_OF_RANGE and "compacted" in details:
        return EtcdCompacted(details)
    if code in TRANSIENT:
        return EtcdUnavailable(url, f"{code.name} {details}".strip())
    return EtcdRequestFailed(f"etcd at {url}: {code.name} {details}")
