"""Keys for whatever leaves this machine: ZeroMQ's CURVE, on every socket that is not on loopback.

A system's state directory holds one key pair for its services and one for its clients. Sockets on loopback use none.
A client on another machine needs a copy of `client.key` and `service.pub`, another host's services all files.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from pathlib import Path
from typing import Any

import zmq

from dejavu.endpoints import state_dir
from dejavu.errors import ConfigurationError

SERVICE_PUBLIC, SERVICE_SECRET, CLIENT = "service.pub", "service.key", "client.key"
_KEY_CHARS = 40


def is_private(endpoint: str) -> bool:
    """Whether what is sent there stays on this machine."""
    if not endpoint.startswith("tcp://"):
        return True
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_keys(folder: Path) -> None:
    """Makes the keys that are missing. Raises `OSError`."""
    if not (folder / SERVICE_SECRET).exists():
        public, secret = zmq.curve_keypair()
        _write(folder / SERVICE_PUBLIC, public)
        _write(folder / SERVICE_SECRET, secret)
    if not (folder / CLIENT).exists():
        _write(folder / CLIENT, zmq.curve_keypair()[1])


def protect_client(socket: Any, endpoint: str, identity: str = CLIENT) -> None:
    """Before `socket` connects to `endpoint`, as the owner of the secret in `identity`. Raises `ConfigurationError`
    where a key is needed and missing."""
    if is_private(endpoint):
        return
    secret = read_key(identity)
    socket.curve_secretkey, socket.curve_publickey = secret, zmq.curve_public(secret)
    socket.curve_serverkey = read_key(SERVICE_PUBLIC)


def _write(file: Path, key: bytes) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(key)


def read_key(name: str) -> bytes:
    """A key of the state directory. Raises `ConfigurationError`."""
    file = state_dir() / name
    try:
        key = file.read_bytes().strip()
        mode = file.stat().st_mode
    except OSError as error:
        raise ConfigurationError(
            f"{file}: {error.strerror}; addresses other than loopback need the keys of the system's state directory",
            field="state_dir",
        ) from error
    if len(key) != _KEY_CHARS:
        raise ConfigurationError(f"{file} holds no key", field="state_dir")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigurationError(f"{file} can be read by others; run chmod 600 on it", field="state_dir")
    return key
