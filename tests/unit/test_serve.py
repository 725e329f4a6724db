"""What `dejavu serve` takes, and what it leaves for clients on its machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from dejavu.errors import ConfigurationError
from deploy.options import check_memory, parse_options
from deploy.serve import check_tokenizer, endpoints_file, main


def test_the_end_of_a_system_hides_no_other_that_began_later(tmp_path: Path) -> None:
    file = tmp_path / "endpoints"
    theirs = ["tcp://127.0.0.1:2", "tcp://127.0.0.1:3"]
    first, second = endpoints_file(tmp_path, ["tcp://127.0.0.1:1"]), endpoints_file(tmp_path, theirs)
    first.__enter__()
    with second:
        first.__exit__(None, None, None)
        assert file.read_text().split() == theirs
    assert not file.exists()


def test_a_system_that_goes_on_is_found_again_after_a_later_one_has_ended(tmp_path: Path) -> None:
    file = tmp_path / "endpoints"
    with socket.create_server(("127.0.0.1", 0)) as router:
        ours = [f"tcp://127.0.0.1:{router.getsockname()[1]}"]
        with endpoints_file(tmp_path, ours):
            with endpoints_file(tmp_path, ["tcp://127.0.0.1:1"]):
                assert file.read_text().split() == ["tcp://127.0.0.1:1"]
            assert file.read_text().split() == ours
    assert not file.exists()


@pytest.mark.parametrize("left", ["tcp://127.0.0.1:1", "no address", "tcp://127.0.0.1:99999999999", "\udcff"])
def test_what_nobody_serves_any_more_is_not_brought_back(left: str, tmp_path: Path) -> None:
    file = tmp_path / "endpoints"
    file.write_bytes(left.encode(errors="surrogateescape"))
    with endpoints_file(tmp_path, ["tcp://127.0.0.1:1"]):
        pass
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


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--prompt-split", "3,3", "--prompt-stages", "3"], "prompt_stages"),
        (["--token-stages", "2", "--token-split", "1,2,3"], "token_stages"),
        (["--replicas", "3", "--cache-stores", "2"], "replicas"),
        (["--replicas", "2", "--cache-stores", "0"], "replicas"),
        (["--routers", "5000000"], "routers"),
        (["--token-pipelines", "1000000"], "token_pipelines"),
        (["--standbys", "1000000"], "standbys"),
    ],
)
def test_counts_that_contradict_each_other_or_are_slips_are_named(arguments: list[str], field: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_options(["--port", "0", *arguments])
    assert refused.value.field == field


@pytest.mark.parametrize("option", ["--port", "--token-stages", "--kv-memory", "--cache-stores", "--prompt-split"])
@pytest.mark.parametrize("number", ["\u0663", "\u00b2", "9" * 5000, "1_000", "+1", "-1", " 1"])
def test_only_plain_numbers_are_numbers(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_options(["--port", "0", f"{option}={number}"])
    assert f"argument {option}: " in capsys.readouterr().err


def test_a_split_may_be_said_twice_and_no_store_is_fine() -> None:
    options = parse_options(["--port", "0", "--token-split", "3,3", "--token-stages", "2", "--cache-stores", "0"])
    assert (options.token_split, options.cache_stores) == ((3, 3), 0)


def test_the_memory_of_all_stages_counts_those_of_a_split() -> None:
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    few = ["--port", "0", "--kv-memory", str(quarter)]
    check_memory(parse_options(few), "cpu")
    for split in (["--token-split", "2,2,1,1"], ["--prompt-split", "2,2,1,1"]):
        with pytest.raises(ConfigurationError, match="kv_memory: the KV pools of 5 stages"):
            check_memory(parse_options([*few, *split]), "cpu")


def test_the_memory_of_gpus_is_not_counted_but_that_of_copies_in_stores_is() -> None:
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    large = ["--port", "0", "--kv-memory", str(half), "--token-stages", "3"]
    check_memory(parse_options([*large, "--cache-stores", "0"]), "cuda")
    check_memory(parse_options(["--port", "0", "--kv-memory", str(half)]), "cuda")
    with pytest.raises(ConfigurationError, match="cache_stores: copies of the stages' KV need"):
        check_memory(parse_options(large), "cuda")


def test_a_home_that_nobody_has_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match="state_dir: ~nobody-here/x: "):
        parse_options(["--port", "0", "--state-dir", "~nobody-here/x"])
    for model in ("~nobody-here/x", "x" * 5000):
        assert main(["--port", "0", "--model", model]) == 1
        assert capsys.readouterr().err.startswith(f"dejavu: error: model: {model}")


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_tokenizer(tmp_path)
    assert f"{tmp_path} has no tokenizer.json" in caplog.text
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigurationError, match="tokenizer"):
        check_tokenizer(tmp_path)
