"""What is asked for, and when: fixed workloads, LMSys-like lengths, arrivals.

A workload file is JSON: {"vocab": V, "requests": [{"at": seconds, "prompt": [ids], "max_tokens": n}, ...]}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

FIRST_PLAIN_ID = 16
"""Token ids below are special ones in the models that are measured."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One request; `at_s` counts from the start of the run."""

    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Named requests in order of arrival."""

    name: str
    items: tuple[WorkItem, ...]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(item.prompt) for item in self.items)

    @property
    def num_output_tokens(self) -> int:
        return sum(item.max_tokens for item in self.items)

    def rotated(self, salt: int, vocab_size: int) -> Workload:
        """The same lengths with other token ids, so that no cache sees a prompt twice."""
        span = vocab_size - FIRST_PLAIN_ID
        items = tuple(
            replace(item, prompt=tuple(FIRST_PLAIN_ID + (t - FIRST_PLAIN_ID + salt) % span for t in item.prompt))
            for item in self.items
        )
        return replace(self, items=items)


def vocab_size_of(model: str) -> int:
    """Of a checkpoint's folder."""
    return int(json.loads(Path(model, "config.json").read_text())["vocab_size"])


def load_workload(path: Path, limit: int | None = None) -> Workload:
    """Reads a workload file."""
    document = json.loads(path.read_text())
    items = [WorkItem(float(r.get("at", 0.0)), tuple(r["prompt"]), int(r["max_tokens"])) for r in document["requests"]]
    return Workload(document.get("name", path.stem), tuple(items[:limit]))


def decode_heavy(vocab_size: int, num_requests: int = 32, num_output_tokens: int = 128) -> Workload:
    """Prompts of 64 to 256 tokens, a fixed number of output tokens, all at once."""
    return _uniform("decode-heavy", vocab_size, num_requests, (64, 256), num_output_tokens)


def prefill_heavy(vocab_size: int, num_requests: int = 32, num_output_tokens: int = 16) -> Workload:
    """Prompts of 512 to 1024 tokens and short outputs, all at once."""
    return _uniform("prefill-heavy", vocab_size, num_requests, (512, 1024), num_output_tokens)


def lmsys_like(vocab_size: int, num_requests: int = 64, seed: int = 0) -> Workload:
    """Log-normal lengths shaped like LMSYS-Chat-1M's published averages (about 70 in, 215 out), all at once."""
    lengths, ids = random.Random(seed + 1), random.Random(seed)
    items = []
    for _ in range(num_requests):
        num_prompt = max(4, min(768, int(lengths.lognormvariate(3.75, 1.2))))
        num_output = max(8, min(512, int(lengths.lognormvariate(5.05, 0.9))))
        items.append(WorkItem(0.0, _ids(ids, num_prompt, vocab_size), num_output))
    return Workload("lmsys-like", tuple(items))


NAMED: dict[str, Callable[[int], Workload]] = {
    "decode-heavy": decode_heavy,
    "prefill-heavy": prefill_heavy,
    "lmsys-like": lmsys_like,
}


def with_poisson_arrivals(workload: Workload, rate_per_s: float, seed: int = 1) -> Workload:
    """The same requests, arriving as a Poisson process."""
    gaps = random.Random(seed)
    at_s, items = 0.0, []
    for item in workload.items:
        items.append(replace(item, at_s=at_s))
        at_s += gaps.expovariate(rate_per_s)
    return replace(workload, items=tuple(items))


def all_at_once(workload: Workload) -> Workload:
    """The same requests, all present at the start."""
    return replace(workload, items=tuple(replace(item, at_s=0.0) for item in workload.items))


def _uniform(
    name: str, vocab_size: int, num_requests: int, prompt_lengths: tuple[int, int], num_output_tokens: int
) -> Workload:
    draws = random.Random(0)
    lengths = [draws.randint(*prompt_lengths) for _ in range(num_requests)]
    return Workload(
        name, tuple(WorkItem(0.0, _ids(draws, length, vocab_size), num_output_tokens) for length in lengths)
    )


def _ids(draws: random.Random, count: int, vocab_size: int) -> tuple[int, ...]:
    return tuple(draws.randrange(FIRST_PLAIN_ID, vocab_size) for _ in range(count))
