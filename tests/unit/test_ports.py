"""Ports that stay with their owner."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deploy.ports import lasting_ports


def test_they_differ_are_free_and_no_outgoing_connection_gets_them() -> None:
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = lasting_ports(5)
    assert len(set(ports)) == 5 and max(ports) < lowest_outgoing
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_an_address_of_another_machine() -> None:
    with pytest.raises(OSError, match="assign"):
        lasting_ports(1, "192.0.2.1")
