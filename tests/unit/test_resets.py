"""Connections between two processes are found, and nobody else's."""

from __future__ import annotations

from loadtest.resets import between

SAID = """\
0      0      127.0.0.1:5001 127.0.0.1:40001 users:(("python",pid=11,fd=5))
0      0      127.0.0.1:40001 127.0.0.1:5001 users:(("python",pid=22,fd=4))
0      7      127.0.0.1:5002 127.0.0.1:40002 users:(("python",pid=22,fd=6),("python",pid=23,fd=6))
0      0      127.0.0.1:40002 127.0.0.1:5002 users:(("python",pid=11,fd=9))
0      0      127.0.0.1:5001 127.0.0.1:40003 users:(("python",pid=11,fd=7))
0      0      127.0.0.1:40003 127.0.0.1:5001 users:(("python",pid=33,fd=4))
0      0      127.0.0.1:40004 127.0.0.1:5001
"""


def test_those_of_two_processes_are_found_whoever_opened_them() -> None:
    assert between(11, 22, SAID) == [
        ("127.0.0.1:5001", "127.0.0.1:40001"),
        ("127.0.0.1:40002", "127.0.0.1:5002"),
    ]
    assert between(11, 33, SAID) == [("127.0.0.1:5001", "127.0.0.1:40003")]
    assert between(22, 33, SAID) == []
