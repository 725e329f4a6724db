"""A sequence that another router took over answers to its new name alone."""

from __future__ import annotations

from common.messages import Admit
from common.stage.role import Sender
from dejavu.params import SamplingParams
from services.token_stage.audience import Audience

FIRST, SECOND = Sender("router-0", "one"), Sender("router-1", "two")


def admit(name: str) -> Admit:
    return Admit(1, name, 0, b"", b"", SamplingParams(), "")


def test_the_last_router_that_asked_is_the_one_that_hears() -> None:
    audience = Audience()
    audience.enter("r/0/a.0", admit("r/0/a.0"), FIRST)
    assert audience.called("r/0/a.0") == "r/0/a.0"
    audience.enter("r/0/a.0", admit("r/0/b.0"), SECOND)
    assert audience.of_router(FIRST) == []
    assert audience.of_router(SECOND) == ["r/0/a.0"]
    assert audience.called("r/0/b.0") == "r/0/a.0"
    assert audience.called("r/0/a.0") is None, "its first router may not cancel it any more"
    audience.leave("r/0/a.0")
    assert audience.called("r/0/b.0") is None
    assert audience.of("r/0/a.0") is None
