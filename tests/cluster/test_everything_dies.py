"""Everything is killed at once and started again on the same state directory: streams end as they would have."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dejavu import Client, SamplingParams
from tests.cluster.reference import assert_greedy
from tests.cluster.system import TINY, running
from tests.cluster.test_serving import FLOAT32, prompts

pytestmark = pytest.mark.cluster

NUM_TOKENS = 600
LONG = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
# a fast machine is far ahead of its disk; what is missing there must fit into a chunk
LAYOUT = (*FLOAT32, "--chunk-size", "1024", "--disk-memory", "64M")


def store_disk(client: Client) -> dict[str, Any]:
    disks = [service["disk"] for service in client.status()["services"] if service["role"] == "cache_store"]
    assert len(disks) == 1
    return dict(disks[0])


def follow(client: Client, prompt: list[int], tokens: list[int], begun: queue.Queue[int]) -> None:
    for token in client.stream(prompt, LONG):
        tokens.append(token.id)
        if len(tokens) == 20:
            begun.put(1)


def test_streams_survive_the_death_of_everything(tmp_path: Path) -> None:
    work = prompts(41, [10, 40, 70])
    answers: list[list[int]] = [[] for _ in work]
    begun: queue.Queue[int] = queue.Queue()
    with ThreadPoolExecutor(len(work)) as executor:
        with running(*LAYOUT, state_dir=tmp_path) as system:
            client = Client(system.endpoint, outage_limit_s=60.0)
            streams = [
                executor.submit(follow, client, prompt, answer, begun)
                for prompt, answer in zip(work, answers, strict=True)
            ]
            for _ in work:
                begun.get(timeout=30)
            while (safe := store_disk(client))["sequences"] < len(work):
                pass
            system.kill_everything()
        assert not any(stream.done() for stream in streams)
        num_known = sum(map(len, work)) + sum(map(len, answers))
        with client, running(*LAYOUT, "--port", system.endpoint.rpartition(":")[2], state_dir=tmp_path):
            for stream in streams:
                stream.result(timeout=60)
            counters, disk = client.status()["counters"], store_disk(client)
            while store_disk(client)["used_bytes"]:  # what has ended leaves the disk
                pass
    for prompt, tokens in zip(work, answers, strict=True):
        assert len(tokens) == NUM_TOKENS
        assert_greedy(TINY, prompt, tokens)
    assert disk["recalled"] == counters["recoveries"] == len(work)
    assert disk["failures"] == disk["damaged"] == disk["full"] == 0
    # nothing is computed again but what the disk lacked, and the last token of each
    assert counters["recomputed_tokens"] <= num_known - safe["tokens"] + len(work)
