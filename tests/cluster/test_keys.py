"""On an address that others can reach, nobody without the right key gets through any handshake."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from dejavu import AsyncClient
from dejavu.errors import Unavailable
from tests.cluster.reference import assert_greedy
from tests.cluster.system import TINY, descendants, running
from tests.cluster.test_serving import FLOAT32, GREEDY, prompts

pytestmark = pytest.mark.cluster


def own_address() -> str:
    """An address of this machine that is not loopback; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


async def test_keys_decide_who_gets_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host, prompt = own_address(), prompts(6, [50])[0]
    with running(*FLOAT32, "--host", host, "--link", "zmq") as system:
        assert system.endpoint.startswith(f"tcp://{host}:")
        monkeypatch.setenv("DEJAVU_STATE_DIR", system.state_dir)
        async with AsyncClient(system.endpoint) as client:
            assert_greedy(TINY, prompt, (await client.generate(prompt, GREEDY)).token_ids)
        client_secret, service = (Path(system.state_dir, name).read_bytes() for name in ("client.key", "service.pub"))
        for endpoint in listening(system.process.pid, host):
            assert not gets_in(endpoint, None, service), endpoint
            assert not gets_in(endpoint, zmq.curve_keypair()[1], service), endpoint
            assert gets_in(endpoint, client_secret, service) == (endpoint == system.endpoint), endpoint
        monkeypatch.setenv("DEJAVU_STATE_DIR", str(tmp_path))
        with pytest.raises(Unavailable, match=r"client\.key"):
            async with AsyncClient(system.endpoint, connect_timeout_s=1.0):
                pass
        assert {file.stat().st_mode & 0o777 for file in Path(system.state_dir).glob("*.key")} == {0o600}


def listening(pid: int, host: str) -> list[str]:
    """Every TCP address that the system's processes listen on; none of them on all interfaces."""
    found = []
    for process in (pid, *descendants(pid)):
        for connection in psutil.Process(process).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                address = connection.laddr
                assert address.ip in (host, "127.0.0.1"), (process, address)
                if address.ip == host:
                    found.append(f"tcp://{host}:{address.port}")
    # a router listens for clients and for services, a stage for services, a token stage for KV too
    assert len(found) >= 5
    return found


def gets_in(endpoint: str, secret: bytes | None, service: bytes) -> bool:
    """Whether a socket with this key, or with none, finishes its handshake."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger, dealer.reconnect_ivl = 0, -1
        if secret is not None:
            dealer.curve_secretkey, dealer.curve_publickey = secret, zmq.curve_public(secret)
            dealer.curve_serverkey = service
        monitor = dealer.get_monitor_socket()
        dealer.connect(endpoint)
        event: int = zmq.EVENT_CONNECTED
        while event in (zmq.EVENT_CONNECTED, zmq.EVENT_CONNECT_DELAYED):
            event = recv_monitor_message(monitor)["event"]
        dealer.disable_monitor()
        monitor.close(linger=0)
    return bool(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)
