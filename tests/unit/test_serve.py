"""What `dejavu serve` takes, and what it leaves for clients on its machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from dejavu.errors import ConfigurationError
from deploy.options import parse_options
from deploy.serve import endpoints_file


def test_the_end_of_a_system_hides_no_other_that_began_later(tmp_path: Path) -> None:
    file = tmp_path / "endpoints"
    first, second = endpoints_file(tmp_path, ["tcp://h:1"]), endpoints_file(tmp_path, ["tcp://h:2", "tcp://h:3"])
    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        assert file.read_text().split() == ["tcp://h:2", "tcp://h:3"]
    assert not file.exists()


@pytest.mark.parametrize("option", ["--host", "--model", "--state-dir"])
def test_nothing_is_no_place(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_options(["--port", "0", option, ""])
    assert f"argument {option}: is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "host", ["no-such-machine.invalid", "192.0.2.1", "::1", pytest.param("\u00e9" * 80, id="no-name")]
)
@pytest.mark.parametrize("port", ["0", "5999"])
def test_a_host_that_cannot_be_is_refused_at_once(host: str, port: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_options(["--host", host, "--port", port])
    assert refused.value.field == "host" and host in str(refused.value)
