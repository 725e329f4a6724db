"""A client that others kill: `python -m loadtest.doomed_client ENDPOINT NUM_STREAMS` says "streaming" once every stream
has a token, and asks again and again."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from dejavu import AsyncClient
from loadtest.streams import make_work

NUM_TOKENS = 1000


async def _stream(endpoint: str, num_streams: int) -> None:
    async with AsyncClient(endpoint) as client:
        started: asyncio.Queue[int] = asyncio.Queue()
        work = make_work(1, num_streams, NUM_TOKENS)

        async def ask(index: int) -> None:
            while True:
                async with aclosing(client.stream(*work[index])) as tokens:
                    async for token in tokens:
                        if token.index == 0:
                            started.put_nowait(index)

        async with asyncio.TaskGroup() as tasks:
            for index in range(num_streams):
                tasks.create_task(ask(index))
            for _ in range(num_streams):
                await started.get()
            print("streaming", flush=True)


@contextlib.asynccontextmanager
async def doomed_client(endpoint: str, num_streams: int) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """A process with so many streams under way (0: none is started); yields what kills it without a word."""
    if not num_streams:
        yield _nothing
        return
    command = (sys.executable, "-m", "loadtest.doomed_client", endpoint, str(num_streams))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None

    async def kill() -> None:
        if process.returncode is None:
            process.kill()
            await process.wait()

    try:
        await process.stdout.readline()
        yield kill
    finally:
        await kill()


async def _nothing() -> None:
    pass


if __name__ == "__main__":
    asyncio.run(_stream(sys.argv[1], int(sys.argv[2])))
