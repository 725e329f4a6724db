"""The command line of a stage, prompt or token."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass, replace

from common.kv.choice import LINK_NAMES
from common.service import ServiceOptions, add_common_options


@dataclass(frozen=True, slots=True)
class StageOptions(ServiceOptions):
    """`layers` is absolute, end exclusive; `chunk_tokens` bounds the tokens of one step. `other_pipeline` is what the
    pipeline is called in the other role, '' where it has none."""

    role: str
    pipeline: str
    other_pipeline: str
    stage_index: int
    num_stages: int
    layers: tuple[int, int]
    device: str
    kv_memory_bytes: int
    host_kv_memory_bytes: int
    swap: str
    block_size: int
    chunk_tokens: int
    num_threads: int
    cores: str
    link: str
    is_colocated: bool
    is_standby: bool
    num_replicas: int
    recovery: str
    durability: str

    @property
    def host_tier_bytes(self) -> int:
        """Prompt stages have none."""
        return self.host_kv_memory_bytes if self.role == "token_stage" else 0

    def in_other_role(self) -> StageOptions:
        """The same stage of the same layers, in the pipeline that takes this one's place."""
        role = "token_stage" if self.role == "prompt_stage" else "prompt_stage"
        name = self.name.replace(self.pipeline, self.other_pipeline, 1)
        return replace(self, name=name, role=role, pipeline=self.other_pipeline, other_pipeline=self.pipeline)

    @property
    def is_driver(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.num_stages - 1


def parse_stage_options(role: str, description: str | None, argv: list[str] | None) -> StageOptions:
    """Parses a stage's command line; argparse ends the process with 2 on a usage error."""
    parser = argparse.ArgumentParser(f"services.{role}", description=description)
    add_common_options(parser)
    parser.add_argument("--pipeline", required=True, help="name of the pipeline, the same for all its stages")
    parser.add_argument("--other-pipeline", default="", metavar="NAME", help="its name should it change its role")
    parser.add_argument("--stage-index", type=int, required=True)
    parser.add_argument("--num-stages", type=int, required=True)
    parser.add_argument("--layers", type=_layers, required=True, metavar="A:B", help="layers A to B-1 of the model")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    size = functools.partial(parser.add_argument, type=int, metavar="BYTES")
    size("--kv-memory", dest="kv_memory_bytes", required=True, help="size of the KV pool")
    tokens = functools.partial(parser.add_argument, type=int, metavar="TOKENS")
    tokens("--block-size", default=16)
    tokens("--chunk-size", dest="chunk_tokens", default=256, help="tokens of a prefill step")
    number = functools.partial(parser.add_argument, type=int, metavar="N")
    number("--threads", dest="num_threads", default=1, help="compute threads")
    parser.add_argument("--cores", default="", metavar="LIST", help="run on these cores only, e.g. 0,1")
    parser.add_argument("--link", default="auto", choices=["auto", *LINK_NAMES], help="how KV travels")
    flag = functools.partial(parser.add_argument, action="store_true")
    flag("--standby", dest="is_standby", help="wait until somebody's place is free")
    # the rest concerns a prompt stage, too, should it become a token stage
    size("--host-kv-memory", dest="host_kv_memory_bytes", default=0, help="size of the host tier")
    parser.add_argument("--swap", default="auto", choices=["auto", "on", "off"])
    flag("--colocated", dest="is_colocated", help="compute prompts in this pipeline too")
    number("--replicas", dest="num_replicas", default=1, help="copies of every sequence in cache stores")
    parser.add_argument("--recovery", default="auto", choices=["auto", "restore", "replay"])
    parser.add_argument("--durability", default="async", help="async, lag:k or sync, for requests that do not say")
    return StageOptions(role=role, **vars(parser.parse_args(argv)))


def _layers(text: str) -> tuple[int, int]:
    first, last = text.split(":")
    return int(first), int(last)
