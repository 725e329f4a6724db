"""The clients against a router's public side over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from dejavu import AsyncClient, Client, SamplingParams
from dejavu.endpoints import DEFAULT_ENDPOINT, find_endpoints
from dejavu.errors import (
    DejavuError,
    InvalidParameter,
    Overloaded,
    PromptEmpty,
    PromptTooLong,
    ProtocolError,
    RequestCancelled,
    RequestConflict,
    TokenOutOfRange,
    Unavailable,
)
from dejavu.wire import Accepted, Cancel, Ended, NotLeader, Submit, WireError
from tests.unit.fake_router import TEXTS, FakeRouter, frames, tell_story

STORY = "".join(TEXTS)
NOBODY = "tcp://127.0.0.1:1"


def begin_story(router: FakeRouter, client: bytes, submit: Submit) -> None:
    router.send(client, Accepted(submit.request_id, 4), frames(submit, 0, 2))


async def test_stream_yields_tokens_in_order() -> None:
    async with FakeRouter(tell_story) as router, AsyncClient(router.endpoint) as client:
        tokens = [token async for token in client.stream("Tell", SamplingParams(max_tokens=5), "story")]
        submit = await router.got(Submit)
        assert (submit.request_id, submit.prompt, submit.delivered) == ("story", "Tell", [])
        assert submit.params.seed is not None and 0 <= submit.params.seed < 1 << 63
        assert [token.index for token in tokens] == [0, 1, 2, 3, 4]
        assert [token.id for token in tokens] == [10, 11, 12, 13, 14]
        assert "".join(token.text for token in tokens) == STORY
        assert tokens[-1].finish_reason == "stop" and tokens[0].finish_reason is None


async def test_generate_gathers_choices() -> None:
    async with FakeRouter(tell_story) as router, AsyncClient([router.endpoint]) as client:
        completion = await client.generate((1, 2, 3), SamplingParams(n=2, seed=7))
        submit = await router.got(Submit)
        assert (submit.prompt, submit.params.seed) == ([1, 2, 3], 7)
        assert [choice.text for choice in completion.choices] == [STORY, STORY]
        assert completion.token_ids == [10, 11, 12, 13, 14] and completion.text == STORY
        assert completion.finish_reason == "stop" and completion.choices[0].logprobs is None
        assert (completion.usage.num_prompt_tokens, completion.usage.num_output_tokens) == (4, 10)


async def test_requests_run_side_by_side() -> None:
    async with FakeRouter(tell_story) as router, AsyncClient(router.endpoint) as client:
        completions = await asyncio.gather(*(client.generate("Tell") for _ in range(50)))
        assert {completion.text for completion in completions} == {STORY}
        assert len({completion.request_id for completion in completions}) == 50


async def test_leaving_the_loop_cancels() -> None:
    async with FakeRouter(begin_story) as router, AsyncClient(router.endpoint) as client:
        async for token in client.stream("Tell", request_id="left"):
            if token.index == 1:
                break
        assert await router.got(Cancel) == Cancel("left")


async def test_closing_the_client_cancels() -> None:
    async with FakeRouter(begin_story) as router:
        async with AsyncClient(router.endpoint) as client:
            tokens = client.stream("Tell", request_id="open")
            await anext(tokens)
        assert await router.got(Cancel) == Cancel("open")
        assert (await anext(tokens)).index == 1
        with pytest.raises(RequestCancelled, match="closed"):
            await anext(tokens)


async def test_cancel_ends_the_stream() -> None:
    async with (
        FakeRouter(begin_story) as router,
        AsyncClient(router.endpoint) as client,
        aclosing(client.stream("Tell", request_id="mine")) as tokens,
    ):
        await anext(tokens)
        await client.cancel("mine")
        assert await router.got(Cancel) == Cancel("mine")
        router.send(router.clients[0], Ended("mine", "cancelled"))
        await anext(tokens)
        with pytest.raises(RequestCancelled):
            await anext(tokens)


async def test_failures_are_typed() -> None:
    def refuse(router: FakeRouter, client: bytes, submit: Submit) -> None:
        error = WireError("overloaded", "full", None, {"retry_after_s": 2.5})
        router.send(client, Ended(submit.request_id, "failed", error=error))

    async with FakeRouter(refuse) as router, AsyncClient(router.endpoint) as client:
        with pytest.raises(Overloaded, match="full") as caught:
            await client.generate("Tell")
        assert caught.value.retry_after_s == 2.5


@pytest.mark.parametrize(
    ("prompt", "params", "request_id", "kind", "field"),
    [
        ("", SamplingParams(), None, PromptEmpty, "prompt"),
        ([], SamplingParams(), None, PromptEmpty, "prompt"),
        (b"bytes", SamplingParams(), None, InvalidParameter, "prompt"),
        ([1, "2"], SamplingParams(), None, InvalidParameter, "prompt"),
        ([1, True], SamplingParams(), None, InvalidParameter, "prompt"),
        (7, SamplingParams(), None, InvalidParameter, "prompt"),
        ("\udc80", SamplingParams(), None, InvalidParameter, "prompt"),
        ([1, 100], SamplingParams(), None, TokenOutOfRange, "prompt"),
        ([-1], SamplingParams(), None, TokenOutOfRange, "prompt"),
        ([1] * 1001, SamplingParams(), None, PromptTooLong, "prompt"),
        ("x" * ((4 << 20) + 1), SamplingParams(), None, PromptTooLong, "prompt"),
        ("Tell", SamplingParams(max_tokens="9"), None, InvalidParameter, "max_tokens"),  # type: ignore[arg-type]
        ("Tell", SamplingParams(temperature=-1), None, InvalidParameter, "temperature"),
        ("Tell", {"max_tokens": 3}, None, InvalidParameter, "params"),
        ("Tell", SamplingParams(), "x" * 129, InvalidParameter, "request_id"),
        ("Tell", SamplingParams(), "", InvalidParameter, "request_id"),
        ("Tell", SamplingParams(), "\udc80", InvalidParameter, "request_id"),
        ({1: 2}, SamplingParams(), None, InvalidParameter, "prompt"),
        ({1, 2}, SamplingParams(), None, InvalidParameter, "prompt"),
    ],
    ids=str,
)
async def test_wrong_input_is_refused_at_once(
    prompt: str, params: SamplingParams, request_id: str | None, kind: type[DejavuError], field: str
) -> None:
    async with FakeRouter(tell_story) as router, AsyncClient(router.endpoint) as client:
        with pytest.raises(kind) as caught:
            client.stream(prompt, params, request_id)
        assert caught.value.field == field
        assert (await client.generate("Tell")).text == STORY


@pytest.mark.parametrize("name", ["\udc80", "", "x" * 129, None, 7])
async def test_names_that_cannot_be_are_refused_at_once(name: str) -> None:
    async with FakeRouter(tell_story) as router, AsyncClient(router.endpoint) as client:
        with pytest.raises(InvalidParameter, match="request_id"):
            await client.cancel(name)
        with pytest.raises(InvalidParameter, match="name"):
            await client.drain(name)
        assert (await client.generate("Tell")).text == STORY


async def test_id_in_use_is_a_conflict() -> None:
    async with (
        FakeRouter(begin_story) as router,
        AsyncClient(router.endpoint) as client,
        aclosing(client.stream("Tell", request_id="same")) as tokens,
    ):
        await anext(tokens)
        with pytest.raises(RequestConflict):
            await client.generate("Tell", request_id="same")
        assert (await anext(tokens)).index == 1


async def test_unknown_endpoint_names_what_was_tried() -> None:
    async with FakeRouter(tell_story) as silent:
        silent.is_silent = True
        with pytest.raises(Unavailable) as caught:
            async with AsyncClient([NOBODY, silent.endpoint], connect_timeout_s=0.5):
                pass
    assert f"{NOBODY} (connection refused)" in str(caught.value)
    assert f"{silent.endpoint} (no answer)" in str(caught.value)
    assert "dejavu serve" in str(caught.value)


async def test_second_endpoint_is_used_if_the_first_is_dead() -> None:
    async with FakeRouter(tell_story) as router, AsyncClient([NOBODY, router.endpoint]) as client:
        assert (await client.generate("Tell")).text == STORY


async def test_use_before_connecting_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await AsyncClient(NOBODY).generate("Tell")


async def test_repeated_tokens_are_dropped() -> None:
    def stutter(router: FakeRouter, client: bytes, submit: Submit) -> None:
        router.send(client, frames(submit, 0, 3), frames(submit, 1, 3), frames(submit, 0, 5))
        router.send(client, Ended(submit.request_id, "finished", 4, 5))

    async with FakeRouter(stutter) as router, AsyncClient(router.endpoint) as client:
        assert (await client.generate("Tell")).token_ids == [10, 11, 12, 13, 14]


def skip(router: FakeRouter, client: bytes, submit: Submit) -> None:
    router.send(client, frames(submit, 0, 2), frames(submit, 3, 5))


def end_early(router: FakeRouter, client: bytes, submit: Submit) -> None:
    router.send(client, frames(submit, 0, 3), Ended(submit.request_id, "finished", 4, 4))


def stray(router: FakeRouter, client: bytes, submit: Submit) -> None:
    router.send(client, frames(submit, choice=1))


def babble(router: FakeRouter, client: bytes, submit: Submit) -> None:
    router.send_raw(client, b"\x93nonsense")


@pytest.mark.parametrize("misbehave", [skip, end_early, stray, babble])
async def test_nonsense_is_a_protocol_error(misbehave: Callable[[FakeRouter, bytes, Submit], None]) -> None:
    async with FakeRouter(misbehave) as router, AsyncClient(router.endpoint) as client:
        with pytest.raises(ProtocolError):
            await client.generate("Tell", SamplingParams(max_tokens=5))
        router.on_submit = tell_story
        assert (await client.generate("Tell")).text == STORY


async def test_not_leader_redirects_everything() -> None:
    async with FakeRouter(tell_story) as leader:

        def point(router: FakeRouter, client: bytes, submit: Submit) -> None:
            router.send(client, NotLeader(submit.request_id, leader.endpoint))

        async with FakeRouter(point) as standby, AsyncClient(standby.endpoint) as client:
            assert (await client.generate("Tell", request_id="moved")).text == STORY
            assert (await leader.got(Submit)).request_id == "moved"
            assert (await client.generate("Tell")).text == STORY
            assert len(standby.clients) == 1


async def test_without_a_leader_it_asks_again() -> None:
    num_asked = 0

    def hesitate(router: FakeRouter, client: bytes, submit: Submit) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 3:
            tell_story(router, client, submit)
        else:
            router.send(client, NotLeader(submit.request_id, ""))

    async with FakeRouter(hesitate) as router, AsyncClient(router.endpoint) as client:
        assert (await client.generate("Tell")).text == STORY
        assert len(set(router.clients)) == 3


@pytest.mark.parametrize("death", ["silent", "closed"])
async def test_a_lost_router_is_replaced_by_another(death: str) -> None:
    async with (
        FakeRouter(tell_story) as heir,
        FakeRouter(begin_story, [heir.endpoint]) as router,
        AsyncClient(router.endpoint) as client,
        aclosing(client.stream("Tell", SamplingParams(max_tokens=5), "survivor")) as stream,
    ):
        tokens = [await anext(stream), await anext(stream)]
        first = await router.got(Submit)
        if death == "closed":
            router.close()
        router.is_silent = True
        tokens += [token async for token in stream]
        again = await heir.got(Submit)
        assert (again.request_id, again.params) == ("survivor", first.params)
        assert again.delivered == [[10, 11]]
        assert "".join(token.text for token in tokens) == STORY


async def test_a_complete_request_needs_no_other_router() -> None:
    def forget_the_end(router: FakeRouter, client: bytes, submit: Submit) -> None:
        router.send(client, Accepted(submit.request_id, 4), frames(submit))

    async with (
        FakeRouter(tell_story) as heir,
        FakeRouter(forget_the_end, [heir.endpoint]) as router,
        AsyncClient(router.endpoint) as client,
        aclosing(client.stream("Tell")) as stream,
    ):
        tokens = [await anext(stream) for _ in TEXTS]
        router.close()
        assert [token async for token in stream] == []
        assert tokens[-1].finish_reason == "stop"


async def test_a_cancelled_request_is_not_submitted_again() -> None:
    async with (
        FakeRouter(tell_story) as heir,
        FakeRouter(begin_story, [heir.endpoint]) as router,
        AsyncClient(router.endpoint) as client,
        aclosing(client.stream("Tell", request_id="gone")) as stream,
    ):
        await anext(stream)
        await client.cancel("gone")
        router.close()
        with pytest.raises(RequestCancelled):
            while True:
                await anext(stream)
        assert await heir.got(Cancel) == Cancel("gone")


async def test_an_outage_ends_requests_and_the_client_recovers() -> None:
    async with FakeRouter(begin_story) as router, AsyncClient(router.endpoint, outage_limit_s=0.3) as client:
        async with aclosing(client.stream("Tell")) as stream:
            tokens = [await anext(stream), await anext(stream)]
            router.close()
            with pytest.raises(Unavailable, match="connection refused"):
                await anext(stream)
        assert len(tokens) == 2
        async with FakeRouter(tell_story, port=router.port):
            assert (await client.generate("Tell")).text == STORY


async def test_status() -> None:
    async with FakeRouter(tell_story) as router, AsyncClient(router.endpoint) as client:
        assert await client.status() == {"epoch": 3, "services": [], "counters": {}}
        router.status = b"{"
        with pytest.raises(ProtocolError):
            await client.status()


async def test_sync_client() -> None:
    def use(endpoint: str) -> None:
        with Client(endpoint) as client:
            assert client.generate("Tell").text == STORY
            assert "".join(token.text for token in client.stream("Tell")) == STORY
            assert client.status()["epoch"] == 3
            with pytest.raises(PromptEmpty):
                client.stream("")
            for _ in client.stream("Tell", request_id="left"):
                break
            client.cancel("unknown")
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.status()

    async with FakeRouter(tell_story) as router:
        await asyncio.to_thread(use, router.endpoint)


async def test_sync_stream_cancels_when_closed() -> None:
    async with FakeRouter(begin_story) as router:
        client = await asyncio.to_thread(Client, router.endpoint)
        stream = client.stream("Tell", request_id="left")
        await asyncio.to_thread(next, stream)
        stream.close()
        assert await router.got(Cancel) == Cancel("left")
        await asyncio.to_thread(client.close)


def test_sync_client_without_router() -> None:
    with pytest.raises(Unavailable):
        Client(NOBODY, connect_timeout_s=0.2)


def test_where_routers_are_found(tmp_path: Path) -> None:
    home = {"DEJAVU_STATE_DIR": str(tmp_path)}
    assert find_endpoints(None, home) == [DEFAULT_ENDPOINT]
    (tmp_path / "endpoints").write_text("tcp://a:1\ntcp://b:2\n")
    assert find_endpoints(None, home) == ["tcp://a:1", "tcp://b:2"]
    assert find_endpoints(None, home | {"DEJAVU_ENDPOINT": "tcp://c:3, tcp://d:4"}) == [
        "tcp://c:3",
        "tcp://d:4",
    ]
    assert find_endpoints(["tcp://e:5", "tcp://e:5"], home) == ["tcp://e:5"]
    with pytest.raises(InvalidParameter, match="tcp://HOST:PORT"):
        find_endpoints("localhost:5555", home)


async def test_nonsense_on_a_dead_router_s_port_harms_no_request() -> None:
    """Somebody else has its port for a while: requests wait for the router."""
    async with FakeRouter(begin_story) as router, AsyncClient(router.endpoint, outage_limit_s=30) as client:
        tokens = client.stream("Tell", SamplingParams(max_tokens=5))
        async with aclosing(tokens):
            assert (await anext(tokens)).id == 10
            router.close()
            context = zmq.asyncio.Context()
            stranger = context.socket(zmq.ROUTER)
            stranger.bind(router.endpoint)
            for _ in range(2):
                peer, _ = await stranger.recv_multipart()
                await stranger.send_multipart([peer, b"\x93nonsense"])
            context.destroy(linger=0)
            async with FakeRouter(tell_story, port=router.port):
                assert [token.id async for token in tokens] == [11, 12, 13, 14]
