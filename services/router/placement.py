"""Which pipelines a sequence goes to (pure): the least loaded ones that are ready and large enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class PipelineView:
    """What a router knows of a pipeline. `load_tokens` are the tokens it was given and has not finished; `epoch` is the
    last one in which it was ready, `lost_epoch` the last one of which a stage is dead."""

    name: str
    role: str
    epoch: int = 0
    is_ready: bool = False
    is_colocated: bool = False
    capacity_tokens: int = 0
    driver: str = ""
    load_tokens: int = 0
    published_epoch: int = 0
    lost_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """`prompt_pipeline` is '' where the token pipeline is colocated."""

    token_pipeline: str
    prompt_pipeline: str


def place(
    pipelines: Iterable[PipelineView], num_prompt_tokens: int, home: str = "", known: str = "", num_tokens: int = 0
) -> Placement | None:
    """The least loaded pair of ready pipelines, or None while there is none; with its output the sequence may have
    `num_tokens`, and goes where these fit if it can. One that already lives in the pipeline `home` goes on there; the
    prompt pipeline `known` has computed its prompt before, or does so now. A sequence that has outgrown all of them is
    placed all the same: its KV may be there, or comes from a store, and its token pipeline computes what is missing."""
    views = [view for view in pipelines if view.is_ready]
    able = (view for view in views if view.role == "token_stage")
    token = min(
        able, key=lambda v: (v.name != home, v.capacity_tokens < num_tokens, v.load_tokens, v.name), default=None
    )
    if token is None:
        return None
    if token.is_colocated:
        return Placement(token.name, "")
    prompts = (view for view in views if view.role == "prompt_stage")
    prompt = min(
        prompts,
        key=lambda v: (v.capacity_tokens < num_prompt_tokens, v.name != known, v.load_tokens, v.name),
        default=None,
    )
    return None if prompt is None else Placement(token.name, prompt.name)


def prompt_capacity(pipelines: Iterable[PipelineView]) -> int | None:
    """Tokens of the longest prompt that any prompt pipeline can compute; None while none is ready."""
    return max((v.capacity_tokens for v in pipelines if v.is_ready and v.role == "prompt_stage"), default=None)
