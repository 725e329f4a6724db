"""A request id that is used again while the router still speaks of the earlier request."""

from __future__ import annotations

from contextlib import aclosing

from dejavu import AsyncClient
from dejavu.wire import Accepted, Cancel, Ended, Submit
from tests.unit.fake_router import TEXTS, FakeRouter, frames, tell_story


async def test_what_is_said_of_the_earlier_request_is_not_about_the_later() -> None:
    submits: list[Submit] = []

    def be_late(router: FakeRouter, client: bytes, submit: Submit) -> None:
        submits.append(submit)
        if len(submits) == 1:
            router.send(client, Accepted("r", 4), frames(submit, 0, 1))
        else:
            # the cancellation has been read only now
            router.send(client, frames(submits[0], 1, 3), Ended("r", "cancelled"))
            tell_story(router, client, submit)

    async with FakeRouter(be_late) as router, AsyncClient(router.endpoint) as client:
        async with aclosing(client.stream("Tell", request_id="r")) as tokens:
            await anext(tokens)
        answer = await client.generate("Tell", request_id="r")
        assert await router.got(Cancel) == Cancel("r")
        assert answer.text == "".join(TEXTS)


async def test_each_of_several_that_were_left_has_an_end_of_its_own() -> None:
    submits: list[Submit] = []

    def be_late(router: FakeRouter, client: bytes, submit: Submit) -> None:
        submits.append(submit)
        if len(submits) > 1:
            router.send(client, Ended("r", "cancelled"))
        if len(submits) < 3:
            router.send(client, Accepted("r", 4), frames(submit, 0, 1))
        else:
            tell_story(router, client, submit)

    async with FakeRouter(be_late) as router, AsyncClient(router.endpoint) as client:
        for _ in range(2):
            async with aclosing(client.stream("Tell", request_id="r")) as tokens:
                await anext(tokens)
        assert (await client.generate("Tell", request_id="r")).text == "".join(TEXTS)
