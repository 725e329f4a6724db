"""Where a client looks for routers, and in which order it tries them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dejavu.endpoints import DEFAULT_ENDPOINT, DEFAULT_STATE_DIR, RouterList, find_endpoints, state_dir
from dejavu.errors import ConfigurationError, InvalidParameter
from deploy.options import expand_path


def test_router_list_tries_the_preferred_first_then_in_turn() -> None:
    routers = RouterList(["a"])
    assert routers.next() == "a"
    routers.learn(["a", "b"])
    assert [routers.next(), routers.next(), routers.next()] == ["b", "a", "b"]
    routers.prefer("c")
    assert [routers.next(), routers.next(), len(routers)] == ["c", "a", 3]
    routers.learn(["b"])
    assert sorted(routers) == ["a", "b"]


@pytest.mark.parametrize("place", ["/nowhere", "/dev/null", ""])
def test_where_no_system_left_its_endpoints_the_default_is_tried(place: str, tmp_path: Path) -> None:
    assert find_endpoints(None, {"DEJAVU_STATE_DIR": place or str(tmp_path)}) == [DEFAULT_ENDPOINT]


def test_endpoints_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    file = tmp_path / "endpoints"
    file.mkdir()
    with pytest.raises(ConfigurationError, match=f"state_dir: {file} cannot be read"):
        find_endpoints(None, {"DEJAVU_STATE_DIR": str(tmp_path)})
    file.rmdir()
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=f"state_dir: {file} cannot be read"):
        find_endpoints(None, {"DEJAVU_STATE_DIR": str(tmp_path)})


def test_a_state_directory_below_the_home_is_where_serve_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_dir({"DEJAVU_STATE_DIR": "~/system"}) == expand_path("~/system", "state_dir") == tmp_path / "system"
    assert state_dir({}) == expand_path(DEFAULT_STATE_DIR, "state_dir")


@pytest.mark.parametrize(
    "endpoint", [5, [5], {"tcp://a:1"}, b"tcp://a:1", [None], "", ",", [], "tcp://a:0", "here", ["tcp://a:1", "there"]]
)
def test_what_is_no_endpoint_is_refused(endpoint: Any) -> None:
    with pytest.raises(InvalidParameter, match="endpoint: "):
        find_endpoints(endpoint, {})
