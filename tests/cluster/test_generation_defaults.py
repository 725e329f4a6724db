"""A checkpoint that asks for a repetition penalty, served: its tokens are those of transformers' `generate`."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zmq
from transformers import AutoModelForCausalLM

from common.text import TextCodec
from dejavu import AsyncClient, SamplingParams, wire
from tests.cluster.reference import assert_greedy
from tests.cluster.system import ROOT, TINY, running

pytestmark = pytest.mark.cluster

NUM_TOKENS = 24
TEXT = "It was a fine morning, and she was very happy"


def checkpoint(folder: Path) -> Path:
    model = Path(shutil.copytree(TINY, folder / "model"))
    file = model / "generation_config.json"
    said = {"repetition_penalty": 1.3, "min_new_tokens": NUM_TOKENS, "no_repeat_ngram_size": 0, "num_beams": 4}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    return model


def expected_ids(model_dir: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    inputs = torch.tensor([prompt])
    # without its beams, which are not served
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, num_beams=1, max_new_tokens=NUM_TOKENS
    )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def resumed(endpoint: str, submit: wire.Submit) -> list[int]:
    """What a router that knows nothing of a request adds to the tokens that its client has."""
    received: list[int] = []
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(endpoint)
        for question in (wire.Hello(wire.PROTOCOL_VERSION), submit):
            socket.send(wire.encode(question))
        while not isinstance(message := wire.decode_router_message(socket.recv()), wire.Ended):
            if isinstance(message, wire.Tokens):
                received += [frame.token_id for frame in message.frames]
    assert message.outcome == "finished"
    return received


async def test_the_models_own_penalty_is_the_default(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    codec = TextCodec.load(model)
    assert codec is not None
    prompt = codec.encode(TEXT)
    expected = expected_ids(model, prompt)
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, seed=1)
    plain = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, repetition_penalty=1.0, ignore_eos=True)
    with running("--dtype", "float32", "--kv-memory", "16M", "--token-stages", "2", model=model) as system:
        command = [sys.executable, "-m", "dejavu", "generate", TEXT, "--temperature", "0", "--endpoint"]
        command += [system.endpoint, "--max-tokens", str(NUM_TOKENS)]
        typed = await asyncio.to_thread(
            subprocess.run, command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
        async with AsyncClient(system.endpoint) as client:
            both = await client.generate(prompt, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, n=2))
            without = await client.generate(prompt, plain)
        rest = resumed(system.endpoint, wire.Submit("half", prompt, greedy, [expected[:9]]))
        assert "generation_config.json: num_beams 4: not supported, and ignored" in system.log()
    assert [choice.token_ids for choice in both.choices] == [expected] * 2
    assert typed.stdout == codec.decode(expected) + "\n"
    assert rest == expected[9:]
    assert_greedy(model, prompt, without.token_ids)
    assert without.token_ids != expected
