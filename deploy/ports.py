"""Ports for those who must get theirs again when they are started again."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from pathlib import Path

LOWEST = 10_000
_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_LOWEST_OUTGOING = 32_768


def lasting_ports(num: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports of `host` that are free now, and that no outgoing connection can take while their owner is being
    started again: they lie below the range that the system draws from for those. Raises `OSError` where `host` is no
    address of this machine."""
    reserved: list[socket.socket] = []
    candidates = _candidates()
    try:
        while len(reserved) < num:
            listener, port = socket.socket(), next(candidates)
            try:
                listener.bind((host, port))
                reserved.append(listener)
            except OSError as error:
                listener.close()
                # no other port helps where the address is wrong, and to look a name up may take long
                if not port or error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
        return [int(each.getsockname()[1]) for each in reserved]
    finally:
        for each in reserved:
            each.close()


def _candidates() -> Iterator[int]:
    """Then 0, any port, as often as one likes: rather a port that may be lost than none."""
    try:
        lowest_outgoing = int(_OUTGOING.read_text().split()[0])
    except (OSError, ValueError):  # no Linux
        lowest_outgoing = _DEFAULT_LOWEST_OUTGOING
    below = range(LOWEST, max(LOWEST, lowest_outgoing))
    yield from random.sample(below, min(len(below), 100))
    while True:
        yield 0
