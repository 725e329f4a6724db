"""The whole system, real processes: the same tokens as transformers in every layout, nothing leaked, nothing left."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from transformers import AutoTokenizer

from dejavu import AsyncClient, Client, SamplingParams, wire
from dejavu.errors import InvalidParameter, PromptEmpty, PromptTooLong, ProtocolError, TokenOutOfRange
from loadtest.leaks import hunt
from tests.cluster.reference import assert_greedy
from tests.cluster.system import ROOT, TINY, System, descendants, running

pytestmark = pytest.mark.cluster

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
FLOAT32 = ("--dtype", "float32", "--kv-memory", "64M")


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    draws = random.Random(seed)
    return [[draws.randrange(300, 4000) for _ in range(length)] for length in lengths]


async def generate_all(endpoint: str, work: list[list[int]], params: SamplingParams) -> list[list[int]]:
    async with AsyncClient(endpoint) as client:
        completions = await asyncio.gather(*(client.generate(prompt, params) for prompt in work))
    return [completion.token_ids for completion in completions]


def free_blocks(status: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {
        s["name"]: (s["kv_blocks"]["free"], s["kv_blocks"]["total"]) for s in status["services"] if s.get("kv_blocks")
    }


async def settled_status(endpoint: str) -> dict[str, Any]:
    """The status once nothing is live and every block is back (asserted by the test's timeout)."""
    async with AsyncClient(endpoint) as client:
        while True:
            status = await client.status()
            if status["live"]["requests"] == 0 and all(f == t for f, t in free_blocks(status).values()):
                return status


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """One running system for every test here, cut unevenly. Ctrl-C at its end leaves nothing of it behind."""
    before = shared_memory()
    with running(*FLOAT32, "--chunk-size", "64", "--prompt-split", "4,2", "--token-split", "1,3,2") as started:
        below = descendants(started.process.pid)
        assert len(below) >= 7
        yield started
        assert started.stop(signal.SIGINT) == 0
    assert not [pid for pid in below if Path("/proc", str(pid)).exists()]
    assert not shared_memory() - before


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if not name.startswith("__KMP")}


async def test_refusals(system: System) -> None:
    async with AsyncClient(system.endpoint) as client:
        with pytest.raises(PromptEmpty):
            await client.generate([], GREEDY)
        with pytest.raises(TokenOutOfRange):
            await client.generate([1, 1 << 20], GREEDY)
        with pytest.raises(PromptTooLong):
            await client.generate([5] * 5000, GREEDY)
        with pytest.raises(PromptTooLong):
            await client.generate([5] * 10, SamplingParams(max_tokens=4096))
        with pytest.raises(InvalidParameter, match="stop_token_ids"):
            await client.generate([5], SamplingParams(stop_token_ids=[1 << 20]))


@pytest.mark.parametrize(
    ("prompt", "params", "code", "field"),
    [
        ("x", {"temperature": math.nan}, "invalid_parameter", "temperature"),
        ("x", {"temperature": "hot"}, "invalid_parameter", "temperature"),
        ("x", {"warmth": 1}, "unknown_field", "warmth"),
        ("x", [], "invalid_parameter", "params"),
        (7, {}, "invalid_parameter", "prompt"),
        ("", {}, "prompt_empty", "prompt"),
        ([], {}, "prompt_empty", "prompt"),
        ([4096], {}, "token_out_of_range", "prompt"),
        ([5] * 4000, {"max_tokens": 97}, "context_exceeded", "max_tokens"),
    ],
)
def test_the_router_judges_for_itself(system: System, prompt: object, params: object, code: str, field: str) -> None:
    """As sent by a client that checks nothing."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(system.endpoint)
        socket.send(wire.encode(wire.Hello(wire.PROTOCOL_VERSION)))
        assert isinstance(wire.decode_router_message(socket.recv()), wire.Welcome)
        socket.send(msgspec.msgpack.encode(["submit", "some-id", prompt, params]))
        ended = wire.decode_router_message(socket.recv())
    assert isinstance(ended, wire.Ended) and ended.error is not None
    assert (ended.request_id, ended.error.code, ended.error.field) == ("some-id", code, field)


def test_a_client_of_another_protocol_version_is_refused_whatever_it_asks(system: System) -> None:
    """As sent by a client that compares nothing; one that does sees by the welcome why."""
    other = wire.PROTOCOL_VERSION - 1
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = 10_000
        socket.connect(system.endpoint)
        asked = wire.Hello(other), wire.Submit("some-id", [5], SamplingParams(seed=1)), wire.StatusQuery(1)
        for message in asked:
            socket.send(wire.encode(message))
        welcome, *refusals = [wire.decode_router_message(socket.recv()) for _ in range(1 + len(asked))]
    assert isinstance(welcome, wire.Welcome) and welcome.protocol_version == wire.PROTOCOL_VERSION
    said = f"this client speaks protocol {other}, the router protocol {wire.PROTOCOL_VERSION}"
    error = wire.WireError("protocol_error", said)
    assert refusals == [wire.Ended(request_id, "failed", error=error) for request_id in ("", "some-id", "")]


async def test_a_client_that_meets_another_protocol_version_says_so_at_once(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = wire.PROTOCOL_VERSION
    monkeypatch.setattr(wire, "PROTOCOL_VERSION", ours + 1)
    with pytest.raises(ProtocolError, match=f"speaks protocol {ours}, not {ours + 1}"):
        # it does not wait for another router to come
        async with asyncio.timeout(10), AsyncClient(system.endpoint, connect_timeout_s=60):
            pass


async def test_seeds_hold_alone_and_in_a_batch(system: System) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, seed=11, max_tokens=16, n=2, ignore_eos=True)
    work = prompts(3, [20, 40, 9])
    async with AsyncClient(system.endpoint) as client:
        alone = [await client.generate(prompt, params) for prompt in work]
        together = await asyncio.gather(*(client.generate(prompt, params) for prompt in work * 2))
    for completion, expected in zip(together, alone * 2, strict=True):
        assert [c.token_ids for c in completion.choices] == [c.token_ids for c in expected.choices]
    assert alone[0].choices[0].token_ids != alone[0].choices[1].token_ids


async def test_choices_share_what_was_computed_for_their_prompt(system: System) -> None:
    prompt = prompts(8, [150])[0]
    async with AsyncClient(system.endpoint) as client:
        before = found_tokens(await client.status())
        completion = await client.generate(prompt, msgspec.structs.replace(GREEDY, n=3))
        after = found_tokens(await client.status())
    assert after - before == 2 * len(prompt)
    for choice in completion.choices:
        assert_greedy(TINY, prompt, choice.token_ids)


def found_tokens(status: dict[str, Any]) -> int:
    return sum(service["retained"]["found_tokens"] for service in status["services"] if "retained" in service)


async def test_the_first_token_can_be_the_last(system: System) -> None:
    prompt = prompts(5, [30])[0]
    async with AsyncClient(system.endpoint) as client:
        tokens = (await client.generate(prompt, GREEDY)).token_ids
        one = await client.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
        assert (one.token_ids, one.finish_reason) == (tokens[:1], "length")
        stop = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[tokens[0]])
        first = await client.generate(prompt, stop)
        assert (first.token_ids, first.finish_reason, first.text) == (tokens[:1], "stop", "")


async def test_64_requests_of_mixed_lengths_at_once(system: System) -> None:
    draws = random.Random(64)
    work = prompts(64, [draws.choice((1, 15, 16, 17, 64, draws.randrange(1, 400))) for _ in range(64)])
    wishes = [SamplingParams(temperature=0.0, max_tokens=draws.randrange(1, 40), ignore_eos=True) for _ in work]
    async with AsyncClient(system.endpoint) as client:
        completions = await asyncio.gather(*(client.generate(p, w) for p, w in zip(work, wishes, strict=True)))
    for prompt, wish, completion in zip(work, wishes, completions, strict=True):
        assert len(completion.token_ids) == wish.max_tokens
        assert_greedy(TINY, prompt, completion.token_ids)


EMOJI = ("🌍", "It was a quiet 👩‍👩‍👧‍👦 morning, naïve café 東京 🇩🇪", "é", "ends with half of �")


@pytest.mark.parametrize("prompt", EMOJI)
async def test_text_of_any_script(system: System, prompt: str) -> None:
    """Prompts become the ids that transformers' tokenizer gives, ids the text that it gives."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    wild = SamplingParams(temperature=100.0, max_tokens=80, seed=3, ignore_eos=True)
    async with AsyncClient(system.endpoint) as client:
        assert_greedy(TINY, tokenizer.encode(prompt), (await client.generate(prompt, GREEDY)).token_ids)
        streamed = [token async for token in client.stream(prompt, wild)]
    text = tokenizer.decode([token.id for token in streamed], skip_special_tokens=True)
    assert "".join(token.text for token in streamed) == text
    assert "�" in text  # single bytes of longer characters were among the tokens


async def test_stop_strings(system: System) -> None:
    async with AsyncClient(system.endpoint) as client:
        plain = await client.generate(EMOJI[1], GREEDY)
        cut = plain.text[len(plain.text) // 2 :][:3]
        stopped = await client.generate(EMOJI[1], SamplingParams(temperature=0.0, max_tokens=24, stop=[cut]))
    assert (stopped.text, stopped.finish_reason) == (plain.text[: plain.text.index(cut)], "stop")


async def test_cancels_and_disconnects_leak_nothing(system: System) -> None:
    await hunt(system.endpoint, num_requests=150, seed=1)


def test_command_line(system: System) -> None:
    environment = os.environ | {"DEJAVU_ENDPOINT": system.endpoint}
    command = [sys.executable, "-m", "dejavu"]
    done = subprocess.run(
        [*command, "generate", "Once upon a time", "--max-tokens", "8", "--temperature", "0"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    bad = subprocess.run(
        [*command, "generate", "x", "--temperature", "nan"],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert bad.returncode != 0 and "temperature" in bad.stderr
    status = subprocess.run(
        [*command, "status", "--json"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    roles = {service["role"] for service in json.loads(status.stdout)["services"]}
    assert {"router", "prompt_stage", "token_stage"} <= roles


def test_sync_client(system: System) -> None:
    with Client(system.endpoint) as client:
        assert client.generate([5, 6, 7], GREEDY).finish_reason == "length"
        assert len(list(client.stream([5, 6, 7], GREEDY))) == GREEDY.max_tokens
