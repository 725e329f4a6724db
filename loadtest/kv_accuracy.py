"""What int8 and fp8 on the wire do to a model's output: `python -m loadtest.kv_accuracy --json FILE --model DIR`.

Prompts are prefilled; their KV travels as each type (`stream_out` into a landing pool, `stream_in` from there) into a
pool of the model's own type; then tokens are generated greedily on what arrived. Beside each type: how far keys and
values are off, how many tokens agree with those generated on the original KV before the first that differs, and, fed
with the original's tokens, how often the likeliest token is the same and the KL divergence of the distributions.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from common.kv.checksum import hash_tokens
from common.kv.layout import QUANTISED
from common.kv.link import open_link
from common.kv.pool import KvPool
from common.kv.primitives import Peer, Piece, Region, SequenceSpan, gather, stream_in, stream_out
from common.kv.server import PoolServer
from common.messages import pack_ids
from loadtest.figures import save
from loadtest.machine import describe_machine
from loadtest.one_stage import OneStage, greedy
from loadtest.options import add_json, add_model, new_parser


@dataclass(slots=True)
class Decoding:
    """Tokens [step][sequence], and the logits that each but the first was chosen from."""

    tokens: list[list[int]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def main() -> int:
    """Measures every type."""
    arguments = _parser().parse_args()
    num_tokens = arguments.prompt_tokens + arguments.tokens
    stage = OneStage(arguments.model, arguments.dtype, arguments.prompts, num_tokens)
    prompts = [stage.prompt(arguments.prompt_tokens, seed) for seed in range(arguments.prompts)]
    first = [greedy(stage.prefill(index, prompt))[0] for index, prompt in enumerate(prompts)]
    types: dict[str, Any] = {}
    exact = Decoding()
    for wire in (stage.spec.dtype, *QUANTISED):
        pool = asyncio.run(_travelled(stage, prompts, wire))
        free = _decode(stage, pool, first, arguments)
        exact = exact if types else free
        forced = _decode(stage, pool, first, arguments, exact.tokens)
        types[wire] = _kv_error(stage, pool, prompts) | _agreement(exact, free, forced)
        print(wire, types[wire], flush=True)
    document = {"machine": describe_machine(), "model": Path(arguments.model).name, "dtype": stage.spec.dtype}
    document |= {"options": vars(arguments), "types": types}
    save(arguments.json, document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("kv_accuracy", __doc__)
    add_json(parser)
    add_model(parser, "float32")
    parser.add_argument("--prompts", type=int, default=16, metavar="N", help="of random tokens")
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="N", help="of each prompt")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="generated for each prompt")
    return parser


async def _travelled(stage: OneStage, prompts: Sequence[Sequence[int]], wire: str) -> KvPool:
    """A pool like the model's own, with all prompts' KV in it, which travelled as `wire`."""
    landing = KvPool.create(msgspec.structs.replace(stage.pool.layout, dtype=wire), name="landing")
    pool = KvPool.create(stage.pool.layout, name="arrived")
    server = await PoolServer.start(landing, "127.0.0.1", "accuracy")
    link = await open_link(server.offer, stage.pool, travels_as=wire)
    for index, prompt in enumerate(prompts):
        ids, tokens, blocks = pack_ids(prompt), (0, len(prompt)), stage.blocks(index)
        span = SequenceSpan(str(index), tokens, stage.layers, blocks, [blocks], hash_tokens(ids))
        pieces = await stream_out(stage.pool, [span], [Peer(link, landing.layout)])
        region = Region(tokens, stage.layers, stage.pool.layout.heads)
        await stream_in(pool, blocks, str(index), region, _each(pieces), token_ids=ids, landing=(landing, blocks))
    await link.aclose()
    await server.aclose()
    return pool


async def _each(pieces: Sequence[Piece]) -> AsyncIterator[Piece]:
    for piece in pieces:
        yield piece


def _decode(
    stage: OneStage,
    pool: KvPool,
    first: Sequence[int],
    arguments: argparse.Namespace,
    forced: Sequence[Sequence[int]] = (),
) -> Decoding:
    """Goes on behind the prompts in `pool`: greedily, or with the `forced` tokens."""
    runner, done = stage.on_pool(pool), Decoding([list(first)])
    for step in range(arguments.tokens - 1):
        tokens = list(forced[step]) if forced else done.tokens[-1]
        done.logits.append(stage.step(tokens, [arguments.prompt_tokens + step] * len(first), runner))
        done.tokens.append(greedy(done.logits[-1]))
    return done


def _kv_error(stage: OneStage, pool: KvPool, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Root mean square and largest error, as shares of the root mean square of keys and values."""
    square, error, largest, count = 0.0, 0.0, 0.0, 0
    for index, prompt in enumerate(prompts):
        region = Region((0, len(prompt)), stage.layers, stage.pool.layout.heads)
        sent, got = (_values(asyncio.run(gather(one, stage.blocks(index), region))) for one in (stage.pool, pool))
        off = (got - sent).double()
        square += float(sent.double().square().sum())
        error += float(off.square().sum())
        largest = max(largest, float(off.abs().max()))
        count += sent.numel()
    scale = (square / count) ** 0.5
    return {"rms_error": round((error / count) ** 0.5 / scale, 6), "largest_error": round(largest / scale, 6)}


def _values(packed: KvPool) -> Tensor:
    values: Tensor = packed.arena.view(getattr(torch, packed.layout.dtype)).float()
    return values


def _agreement(exact: Decoding, free: Decoding, forced: Decoding) -> dict[str, Any]:
    """`tokens_until_different`: mean over the sequences, of so many as were generated."""
    sequences = list(zip(zip(*exact.tokens, strict=True), zip(*free.tokens, strict=True), strict=True))
    same = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in sequences]
    likeliest, divergence = [], []
    for ours, theirs in zip(exact.logits, forced.logits, strict=True):
        p, q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        likeliest.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
        divergence.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return {
        "tokens_until_different": round(statistics.fmean(same), 2),
        "of": len(exact.tokens),
        "same_likeliest_token": round(statistics.fmean(likeliest), 4),
        "kl_divergence": float(f"{max(0.0, statistics.fmean(divergence)):.3g}"),
    }


if __name__ == "__main__":
    sys.exit(main())
