"""Who may talk to a socket that is not on loopback: CURVE keys, checked by ZeroMQ's own authentication protocol."""

from __future__ import annotations

import functools
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from dejavu.keys import CLIENT, SERVICE_SECRET, is_private, protect_client, read_key

CLIENTS, SERVICES = "clients", "services"
HANDSHAKE_MS = 1000
"""Who says nothing sensible for so long is cut off."""
_IDENTITIES = {CLIENTS: CLIENT, SERVICES: SERVICE_SECRET}


def protect_service(socket: Any, endpoint: str) -> None:
    """Before a service's `socket` connects to another service at `endpoint`. Raises `ConfigurationError`."""
    protect_client(socket, endpoint, SERVICE_SECRET)


def protect_server(socket: Any, endpoint: str, admits: str = SERVICES) -> None:
    """Before `socket`, of the process's common context, binds to `endpoint`: only `admits` may connect. Raises
    `ConfigurationError`."""
    # with a domain libzmq cuts off who speaks its oldest protocol, which is what it takes HTTP, TLS and noise for
    socket.zap_domain = admits.encode()
    if is_private(endpoint):
        return
    _authenticator()
    socket.curve_secretkey = read_key(SERVICE_SECRET)
    socket.curve_server = True


@functools.cache
def _authenticator() -> ThreadAuthenticator:
    """Answers for every socket of this process; started once."""
    authenticator = ThreadAuthenticator(zmq.Context.instance())
    authenticator.start()
    for domain, identity in _IDENTITIES.items():
        authenticator.configure_curve_callback(domain, _Known(zmq.curve_public(read_key(identity))))
    return authenticator


class _Known:
    """Lets in whoever has proved to own one key."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public_key
