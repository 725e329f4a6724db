"""The `dejavu` command as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import pytest

from dejavu.cli_serve import serve
from dejavu.cli_status import render_status
from dejavu.wire import Accepted, Cancel, Ended, Submit, TokenFrame, Tokens, WireError
from tests.unit.fake_router import FakeRouter, frames, tell_story

ROOT = Path(__file__).resolve().parents[2]


async def start(*arguments: str, **environment: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dejavu", *arguments),
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
    )


async def run(*arguments: str, **environment: str) -> tuple[int | None, str, str]:
    """(exit code, stdout, stderr)"""
    process = await start(*arguments, **environment)
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_generate_prints_text_as_it_arrives() -> None:
    def begin(router: FakeRouter, client: bytes, submit: Submit) -> None:
        router.send(client, Accepted(submit.request_id, 4), frames(submit, 0, 2))

    async with FakeRouter(begin) as router:
        options = "--max-tokens 9 --temperature 0.5 --top-p 0.9 --top-k 7 --seed 3 --stop X --stop Y --ignore-eos"
        process = await start("generate", "Tell", *options.split(), DEJAVU_ENDPOINT=router.endpoint)
        assert process.stdout is not None
        assert await process.stdout.readexactly(9) == b"Once upon"
        submit = await router.got(Submit)
        router.send(router.clients[0], frames(submit, 2), Ended(submit.request_id, "finished", 4, 5))
        assert await process.communicate() == (b" a time.\n", b"")
        assert process.returncode == 0
    params = submit.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (9, 0.5, 0.9, 7)
    assert (params.seed, params.stop, params.ignore_eos) == (3, ["X", "Y"], True)


async def test_generate_fails_with_the_reason() -> None:
    def refuse(router: FakeRouter, client: bytes, submit: Submit) -> None:
        error = WireError("context_exceeded", "too long", "prompt")
        router.send(client, Ended(submit.request_id, "failed", error=error))

    async with FakeRouter(refuse) as router:
        code, out, err = await run("generate", "Tell", "--endpoint", router.endpoint)
    assert (code, out, err) == (1, "", "dejavu: error: prompt: too long\n")


async def test_ctrl_c_cancels() -> None:
    def begin(router: FakeRouter, client: bytes, submit: Submit) -> None:
        router.send(client, frames(submit, 0, 2))

    async with FakeRouter(begin) as router:
        process = await start("generate", "Tell", "--endpoint", router.endpoint)
        assert process.stdout is not None
        await process.stdout.readexactly(9)
        process.send_signal(signal.SIGINT)
        submit = await router.got(Submit)
        assert await router.got(Cancel) == Cancel(submit.request_id)
        assert (await process.communicate())[1] == b""
        assert process.returncode == 130


INTERRUPTED = """
import os, signal, sys
sys.addaudithook(lambda event, arguments: event == "import" and arguments[0] == {module!r}
                 and os.kill(os.getpid(), signal.SIGINT))
from dejavu.cli import main
sys.exit(main({arguments!r}))
"""


@pytest.mark.parametrize(
    ("arguments", "module", "code"),
    [
        (["status"], "argparse", 130),
        (["generate", "Tell"], "msgspec", 130),
        (["status"], "zmq", 130),
        (["serve", "--help"], "dejavu.cli_serve", 0),
        (["serve", "--help"], "deploy.options", 0),
    ],
)
async def test_ctrl_c_while_modules_are_imported(arguments: list[str], module: str, code: int) -> None:
    program = INTERRUPTED.format(module=module, arguments=arguments)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=PIPE, stderr=PIPE, cwd=ROOT)
    assert (await process.communicate()) == (b"", b"")
    assert process.returncode == code


async def test_reader_that_leaves_is_no_traceback() -> None:
    def begin(router: FakeRouter, client: bytes, submit: Submit) -> None:
        router.send(client, frames(submit, 0, 2))

    async with FakeRouter(begin) as router:
        reading, writing = os.pipe()
        arguments = (sys.executable, "-m", "dejavu", "generate", "Tell", "--endpoint", router.endpoint)
        process = await asyncio.create_subprocess_exec(*arguments, stdout=writing, stderr=PIPE, cwd=ROOT)
        os.close(writing)
        submit = await router.got(Submit)
        os.close(reading)
        router.send(router.clients[0], frames(submit, 2))
        assert await router.got(Cancel) == Cancel(submit.request_id)
        assert (await process.communicate())[1] == b""
        assert process.returncode == 1


async def test_a_full_disk_is_named() -> None:
    async with FakeRouter(tell_story) as router:
        with open("/dev/full", "wb") as full:
            arguments = (sys.executable, "-m", "dejavu", "generate", "Tell", "--endpoint", router.endpoint)
            process = await asyncio.create_subprocess_exec(*arguments, stdout=full, stderr=PIPE, cwd=ROOT)
            assert (await process.communicate())[1] == b"dejavu: error: stdout: No space left on device\n"
    assert process.returncode == 1


async def test_a_terminal_that_cannot_show_a_character_shows_another() -> None:
    def speak(router: FakeRouter, client: bytes, submit: Submit) -> None:
        frame = TokenFrame(submit.request_id, 0, 1, 0, 5, "a\U0001f600b", "stop")
        router.send(client, Tokens([frame]), Ended(submit.request_id, "finished", 4, 1))

    async with FakeRouter(speak) as router:
        answer = await run("generate", "Tell", "--endpoint", router.endpoint, PYTHONIOENCODING="latin-1")
    assert answer == (0, "a?b\n", "")


STATUS = {
    "epoch": 4,
    "services": [
        {
            "name": "token-0-1",
            "role": "token_stage",
            "pid": 12,
            "state": "active",
            "pipeline": "token-0",
            "stage_index": 1,
            "num_stages": 2,
            "layers": [4, 8],
            "kv_blocks": {"total": 64, "free": 60, "quarantined": 0},
            "link": "shm",
        },
        {
            "name": "router-0",
            "role": "router",
            "pid": 11,
            "state": "leader",
            "pipeline": None,
            "layers": None,
        },
    ],
    "counters": {"recoveries": 2, "refused_frames": 0},
    "events": [],
}


async def test_status() -> None:
    assert render_status(STATUS).splitlines() == [
        "epoch 4, 2 services",
        "",
        "NAME       ROLE         PID  STATE   STAGE        LAYERS  KV FREE/TOTAL  LINK",
        "token-0-1  token_stage  12   active  token-0 2/2  4..7    60/64          shm",
        "router-0   router       11   leader  -            -       -              -",
        "",
        "recoveries  2",
    ]
    async with FakeRouter(tell_story) as router:
        router.status = json.dumps(STATUS).encode()
        code, out, err = await run("status", "--json", "--endpoint", router.endpoint)
        assert (code, json.loads(out), err) == (0, STATUS, "")
        code, out, _ = await run("status", "--endpoint", router.endpoint)
        assert (code, out) == (0, render_status(STATUS) + "\n")


def test_status_says_what_the_device_is_used_for() -> None:
    swap = {"decision": "resident", "forced": False}
    stage = {"pipeline": "token-0", "device_kv_blocks": {"resident": 30, "total": 32, "peak": 32}, "swap": swap}

    def line() -> str:
        return render_status({"services": [stage]}).splitlines()[-1]

    assert line() == "token-0: 30 of 32 device blocks, resident (all fit)"
    swap |= {"gain": 0.8, "microbatch_swapping": 8.0, "microbatch_resident": 4.0}
    swap |= {"step_swapping_ms": 50.0, "step_resident_ms": 20.0, "transfer_ms": 48.0}
    assert line() == (
        "token-0: 30 of 32 device blocks, resident (swapping would give 0.8x: "
        "8.0 sequences in 50.0 ms against 4.0 in 20.0 ms; transfer 48.0 ms)"
    )
    swap |= {"forced": True, "decision": "swapping"}
    assert line() == "token-0: 30 of 32 device blocks, swapping (as told)"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 0, "examples:"),
        (["--help"], 0, "DEJAVU_ENDPOINT"),
        (["--version"], 0, "dejavu "),
        (["generate", "--help"], 0, "--max-tokens"),
        (["generate"], 2, "TEXT"),
        (["dance"], 2, "dance"),
        (["generate", "Tell", "--temperature", "-1"], 1, "dejavu: error: temperature: "),
        (["status", "--endpoint", "tcp://here:65536"], 1, "dejavu: error: endpoint: 'tcp://here:65536' is not of"),
        (["status", "--endpoint", "here"], 1, "dejavu: error: endpoint: 'here' is not of the form"),
    ],
)
async def test_usage(arguments: list[str], code: int, words: str) -> None:
    exit_code, out, err = await run(*arguments)
    assert exit_code == code
    assert words in (out if code == 0 else err)
    assert "Traceback" not in err


def test_serve_needs_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(["--help"], tmp_path) == 1
    assert "needs a checkout" in capsys.readouterr().err


async def test_serve_hands_arguments_on(tmp_path: Path) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "serve.py").write_text("def main(argv):\n    print(argv)\n    return 7\n")
    (tmp_path / "dejavu").symlink_to(ROOT / "dejavu")
    code = "import pathlib, sys, dejavu.cli_serve as c; sys.exit(c.serve(sys.argv[1:], pathlib.Path.cwd()))"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, "--help", "--port", "0"), stdout=PIPE, cwd=tmp_path
    )
    assert (await process.communicate())[0] == b"['--help', '--port', '0']\n"
    assert process.returncode == 7
