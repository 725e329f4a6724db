"""In which order a client tries its routers."""

from __future__ import annotations

from dejavu.endpoints import RouterList


def test_router_list_tries_the_preferred_first_then_in_turn() -> None:
    routers = RouterList(["a"])
    assert routers.next() == "a"
    routers.learn(["a", "b"])
    assert [routers.next(), routers.next(), routers.next()] == ["b", "a", "b"]
    routers.prefer("c")
    assert [routers.next(), routers.next(), len(routers)] == ["c", "a", 3]
    routers.learn(["b"])
    assert sorted(routers) == ["a", "b"]
