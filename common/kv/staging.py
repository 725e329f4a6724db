"""Host memory through which the blocks of a device pool pass: links and checksums work on host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import torch

from common.kv.geometry import Range
from common.kv.pool import KvPool

new_stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream
_new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event


def mark_work(device: torch.device) -> torch.cuda.Event | None:
    """What has been given to the calling thread's current stream so far; None where nothing is
    asynchronous."""
    if device.type != "cuda":
        return None
    event = _new_event()
    event.record(torch.cuda.current_stream(device))
    return event


class SideStream:
    """A stream of its own on a GPU, for what neither waits for the compute nor is waited for by it; on the host
    nothing. Several threads may use it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = new_stream(device) if device.type == "cuda" else None

    @contextmanager
    def work(self, after: Sequence[torch.cuda.Event] = ()) -> Iterator[None]:
        """What is done inside goes to the stream, behind `after`, and is over when the block has ended."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            for event in after:
                self._stream.wait_event(event)
            yield
        self._stream.synchronize()

    @contextmanager
    def current(self) -> Iterator[None]:
        """It is the calling thread's current stream inside."""
        with torch.cuda.stream(self._stream):
            yield


@functools.cache
def checking_stream(device: torch.device) -> SideStream:
    """The stream on which a device's blocks are looked at and moved, outside of any step."""
    return SideStream(device)


class HostStaging:
    """One buffer (page-locked for a CUDA pool), used again and again: what `copy_out` returned is valid
    until the next call."""

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._is_cuda = pool.device.type == "cuda"
        self._stream = SideStream(pool.device)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy_out(
        self,
        blocks: Sequence[int],
        token_range: Range,
        layer_range: Range,
        after: Sequence[torch.cuda.Event] = (),
    ) -> tuple[KvPool, list[int]]:
        """The blocks that hold a span, as a pool in host memory with a block table of its own; returns when
        the bytes are there. Device work marked by `after` comes first."""
        layout = self._pool.layout
        first, end = token_range[0] // layout.block_size, -(-token_range[1] // layout.block_size)
        staged = self._pool_for(end - first, layer_range)
        with self._stream.work(after):
            self._copy(blocks[first:end], layer_range, staged)
        return staged, [0] * first + list(range(end - first))

    def _copy(self, blocks: Sequence[int], layer_range: Range, staged: KvPool) -> None:
        is_run = list(blocks) == list(range(blocks[0], blocks[0] + len(blocks)))
        index = None if is_run else torch.tensor(blocks, device=self._pool.device)
        for local_layer, layer in enumerate(range(*layer_range)):
            sides = zip(
                staged.layer(local_layer),
                self._pool.layer(layer - self._pool.layout.first_layer),
                strict=True,
            )
            for to, source in sides:
                run = source[blocks[0] : blocks[0] + len(blocks)] if index is None else source[index]
                to.copy_(run, non_blocking=True)

    def _pool_for(self, num_blocks: int, layer_range: Range) -> KvPool:
        layout = msgspec.structs.replace(
            self._pool.layout, first_layer=layer_range[0], last_layer=layer_range[1], num_blocks=num_blocks
        )
        if len(self._buffer) < layout.total_bytes:
            self._buffer = torch.empty(layout.total_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
        return KvPool(layout, self._buffer[: layout.total_bytes], None, self._pool.name)


def landing_pool(pool: KvPool, num_tokens: int) -> tuple[KvPool, Sequence[int]]:
    """Where KV for the first `num_tokens` tokens in blocks of a device pool can be read into (then `copy_in`): host
    memory of the same shape, with the block table there. Locking its pages takes a while."""
    layout = msgspec.structs.replace(pool.layout, num_blocks=-(-num_tokens // pool.layout.block_size))
    arena = torch.empty(layout.total_bytes, dtype=torch.uint8, pin_memory=pool.device.type == "cuda")
    return KvPool(layout, arena, None, pool.name), range(layout.num_blocks)


def copy_in(staged: KvPool, pool: KvPool, blocks: Sequence[int]) -> None:
    """Copies all blocks of `staged` to the first of `blocks` in `pool`; returns when the bytes are there. Neither waits
    for the steps being computed meanwhile nor holds them up."""
    with checking_stream(pool.device).work():
        index = torch.tensor(list(blocks[: staged.layout.num_blocks]), device=pool.device)
        for local_layer in range(pool.layout.num_layers):
            for source, to in zip(staged.layer(local_layer), pool.layer(local_layer), strict=True):
                to.index_copy_(0, index, source.to(pool.device, non_blocking=True))
