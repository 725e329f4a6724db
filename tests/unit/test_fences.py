"""A driver counts a fence only when all stages have answered for it."""

from __future__ import annotations

from services.token_stage.fences import Fences


def test_what_is_asked_for_is_sent_once_and_holds_when_all_have_answered() -> None:
    fences = Fences(num_stages=2)
    need = frozenset({("prompt-0", 5), ("link 3", 8)})
    assert fences.holds(frozenset()) and not fences.holds(need)
    fences.ask({"prompt-0": 5, "link 3": 8})
    fences.ask({"prompt-0": 4})
    assert fences.take_asked() == {"prompt-0": 5, "link 3": 8}
    fences.ask({"prompt-0": 5})
    assert fences.take_asked() == {}
    for stage, oldest in ((0, {"prompt-0": 5}), (1, {"prompt-0": 4, "link 3": 8}), (0, {"link 3": 9})):
        fences.confirm(stage, oldest)
        assert not fences.holds(need)
    fences.confirm(1, {"prompt-0": 6})
    assert fences.holds(need)
    fences.confirm(1, {"prompt-0": 2})
    assert fences.holds(need), "what is fenced off stays so"
