"""What a router does with requests that its predecessor had begun."""

from __future__ import annotations

import pytest

from common.membership import MemberRecord, PipelineRecord
from common.messages import (
    Admit,
    CancelSequence,
    Drawn,
    Message,
    Orphans,
    PipelineReady,
    ProducedToken,
    SequencesUnknown,
    TokensAwaited,
    TokensProduced,
)
from common.model.spec import load_spec
from common.text import TextCodec
from dejavu.errors import PromptTooLong
from dejavu.params import SamplingParams
from dejavu.wire import Accepted, Ended, RouterMessage, Submit
from services.router.clients import Clients
from services.router.placement import PipelineView
from services.router.requests import Requests
from services.router.status import Journal


class Sent:
    """Keeps what goes out."""

    def __init__(self) -> None:
        self.admitted: list[tuple[str, Admit]] = []
        self.told: list[RouterMessage] = []
        self.said: list[tuple[str, TokensAwaited | CancelSequence]] = []

    def to_client(self, client: bytes, message: RouterMessage) -> None:
        self.told.append(message)

    def to_member(self, name: str, message: Message) -> bool:
        if isinstance(message, Admit):
            self.admitted.append((name, message))
        elif isinstance(message, TokensAwaited | CancelSequence):
            self.said.append((name, message))
        return True

    def take(self) -> list[tuple[str, TokensAwaited | CancelSequence]]:
        """What pipelines were told since the last time, but for admissions."""
        said, self.said = self.said, []
        return said


def router_with_two_pipelines() -> tuple[Requests, Sent]:
    sent = Sent()
    requests = Requests(load_spec("models/tiny"), None, sent, Journal(), "me")
    for name in ("token-0", "token-1"):
        view = PipelineView(name, "token_stage", is_colocated=True, driver=f"{name}-stage-0")
        requests.dispatch.pipelines[name] = view
        requests.dispatch.pipeline_ready(view, PipelineReady(name, 7, 1000))
    return requests, sent


def pipeline(name: str, epoch: int, successor: str | None = None) -> PipelineRecord:
    role = f"{name.split('-')[0]}_stage"
    stage = MemberRecord(f"{name}-stage-0", role, "1", 1, "h", "", name, 0, 1, (0, 6), "active")
    return PipelineRecord(name, role, epoch, (stage,), successor)


def come_back(requests: Requests, request_id: str, delivered: list[int]) -> None:
    submit = Submit(request_id, [5, 6, 7], SamplingParams(), [delivered])
    assert requests.precheck(b"client", submit)
    requests.accept(b"client", submit, [5, 6, 7])


def test_a_begun_request_goes_where_it_lives() -> None:
    requests, sent = router_with_two_pipelines()
    requests.dispatch.succeed("router-0")
    come_back(requests, "r", [8, 9])
    requests.dispatch.orphans_found(Orphans("token-0", 7, "router-0", []))
    assert sent.admitted == [], "token-1 may have it"
    requests.dispatch.orphans_found(Orphans("token-1", 7, "router-0", ["r/0"]))
    assert [(name, admit.forced[:4]) for name, admit in sent.admitted] == [("token-1-stage-0", b"\x08\0\0\0")]


def test_a_text_that_cannot_fit_is_judged_by_its_beginning() -> None:
    spec = load_spec("models/tiny")
    requests = Requests(spec, TextCodec.load("models/tiny"), Sent(), Journal(), "me")
    fits = Submit("r", "Once upon a time " * 100, SamplingParams())
    assert len(requests.tokenise(fits)) < spec.max_context_tokens
    with pytest.raises(PromptTooLong, match="prompt: the prompt's beginning alone"):
        requests.tokenise(Submit("r", "ab " * 1_300_000, SamplingParams()))


def test_a_router_that_has_just_started_waits_for_pipelines_that_it_has_not_heard_yet() -> None:
    requests, sent = router_with_two_pipelines()
    requests.dispatch.pipelines["token-1"] = PipelineView(
        "token-1", "token_stage", is_colocated=True, driver="token-1-stage-0"
    )
    requests.dispatch.succeed("router-0")
    requests.dispatch.orphans_found(Orphans("token-0", 7, "router-0", []))
    come_back(requests, "r", [8])
    assert sent.admitted == [], "token-1 may have it"
    requests.dispatch.pipeline_ready(requests.dispatch.pipelines["token-1"], PipelineReady("token-1", 7, 1000))
    requests.dispatch.orphans_found(Orphans("token-1", 7, "router-0", ["r/0"]))
    assert [name for name, _ in sent.admitted] == ["token-1-stage-0"]


def test_where_a_request_lives_is_not_forgotten_while_no_prompt_pipeline_is_there() -> None:
    requests, sent = router_with_two_pipelines()
    for name in ("token-0", "token-1"):
        requests.dispatch.pipelines[name].is_colocated = False
    requests.dispatch.orphans_found(Orphans("token-1", 7, "router-0", ["r/0"]))
    come_back(requests, "r", [8])
    requests.dispatch.pipeline_published(pipeline("prompt-0", 3))
    requests.dispatch.pipeline_ready(requests.dispatch.pipelines["prompt-0"], PipelineReady("prompt-0", 3, 1000))
    assert [name for name, _ in sent.admitted] == ["token-1-stage-0"]


def test_a_prompt_goes_back_to_the_pipeline_that_has_computed_it() -> None:
    requests, sent = router_with_two_pipelines()
    for name in ("token-0", "token-1"):
        requests.dispatch.pipelines[name].is_colocated = False
    for name in ("prompt-0", "prompt-1"):
        requests.dispatch.pipeline_published(pipeline(name, 3))
        requests.dispatch.pipeline_ready(requests.dispatch.pipelines[name], PipelineReady(name, 3, 1000))
    requests.dispatch.pipelines["prompt-0"].load_tokens = 100
    come_back(requests, "r", [])
    requests.dispatch.pipelines["prompt-0"].load_tokens = 0
    requests.dispatch.pipeline_ready(requests.dispatch.pipelines["token-0"], PipelineReady("token-0", 8, 1000))
    assert [admit.prompt_pipeline for _, admit in sent.admitted] == ["prompt-1", "prompt-1"]


def test_new_requests_and_lost_pipelines_do_not_wait() -> None:
    requests, sent = router_with_two_pipelines()
    requests.dispatch.orphans_found(Orphans("token-0", 7, "router-0", []))
    requests.dispatch.succeed("router-0")
    come_back(requests, "new", [])
    come_back(requests, "begun", [8])
    assert [admit.sequence_id.split("/")[0] for _, admit in sent.admitted] == ["new"]
    requests.dispatch.pipeline_lost("token-1")
    assert [(name, admit.sequence_id.split("/")[0]) for name, admit in sent.admitted[1:]] == [
        ("token-0-stage-0", "begun")
    ]


def test_a_pipeline_without_one_of_its_stages_is_not_ready_whatever_its_driver_repeats() -> None:
    requests, _ = router_with_two_pipelines()
    view = requests.dispatch.pipelines["token-0"]
    for epoch in (8, 9):
        requests.dispatch.pipeline_published(pipeline("token-0", epoch))
        requests.dispatch.pipeline_ready(view, PipelineReady("token-0", epoch, 1000))
        assert requests.dispatch.is_ready("token-0")
        requests.dispatch.pipeline_lost("token-0")
        requests.dispatch.pipeline_ready(view, PipelineReady("token-0", epoch, 1000))
        assert not requests.dispatch.is_ready("token-0")


def test_a_silent_pipeline_is_not_waited_for_for_ever() -> None:
    requests, sent = router_with_two_pipelines()
    requests.dispatch.succeed("router-0")
    come_back(requests, "r", [8])
    assert requests.dispatch.stop_awaiting()
    assert len(sent.admitted) == 1


def test_the_time_to_wait_begins_when_somebody_could_be_placed() -> None:
    requests, sent = router_with_two_pipelines()
    for view in requests.dispatch.pipelines.values():
        view.is_ready, view.epoch = False, 0
    requests.dispatch.succeed("router-0")
    come_back(requests, "r", [8])
    assert not requests.dispatch.stop_awaiting()
    requests.dispatch.pipeline_ready(requests.dispatch.pipelines["token-0"], PipelineReady("token-0", 7, 1000))
    assert sent.admitted == [], "token-1 may have it"
    assert requests.dispatch.stop_awaiting() and len(sent.admitted) == 1


def test_sequences_of_a_pipeline_that_is_over_go_on_elsewhere() -> None:
    requests, sent = router_with_two_pipelines()
    come_back(requests, "r", [8, 9])
    come_back(requests, "s", [])
    assert [name for name, _ in sent.admitted] == ["token-0-stage-0", "token-1-stage-0"]
    assert requests.dispatch.longest_tokens("token-0") == 3 + 16
    requests.dispatch.pipeline_published(pipeline("token-0", 8, successor="prompt-1"))
    name, admit = sent.admitted[-1]
    assert (name, admit.sequence_id.split("/")[0], admit.forced) == ("token-1-stage-0", "r", b"\x08\0\0\0\x09\0\0\0")
    assert not requests.dispatch.is_ready("token-0") and len(sent.admitted) == 3
    assert requests.dispatch.pipelines["token-1"].load_tokens == 32


def test_sequences_do_not_wait_for_ever_for_a_pipeline_that_is_not_back() -> None:
    requests, sent = router_with_two_pipelines()
    come_back(requests, "r", [8])
    come_back(requests, "s", [])
    requests.dispatch.pipeline_lost("token-0")
    requests.dispatch.move_from("token-0")
    assert [name for name, _ in sent.admitted] == ["token-0-stage-0", "token-1-stage-0", "token-1-stage-0"]
    requests.dispatch.pipeline_lost("token-1")
    requests.dispatch.move_from("token-1")
    assert len(sent.admitted) == 3, "there is no other"
    requests.dispatch.pipeline_ready(requests.dispatch.pipelines["token-0"], PipelineReady("token-0", 8, 1000))
    requests.dispatch.move_from("token-0")
    assert len(sent.admitted) == 3, "it is back"
    requests.dispatch.move_from("token-1")
    assert [name for name, _ in sent.admitted[3:]] == ["token-0-stage-0"] * 2


def test_what_has_begun_waits_for_a_pipeline_that_can_hold_it() -> None:
    """The other one would fail it."""
    requests, sent = router_with_two_pipelines()
    requests.dispatch.pipelines["token-1"].capacity_tokens = 10
    come_back(requests, "r", [8])
    requests.dispatch.pipeline_lost("token-0")
    requests.dispatch.move_from("token-0")
    come_back(requests, "s", [8])
    assert [name for name, _ in sent.admitted] == ["token-0-stage-0"]
    requests.dispatch.pipeline_ready(requests.dispatch.pipelines["token-0"], PipelineReady("token-0", 8, 1000))
    assert [name for name, _ in sent.admitted] == ["token-0-stage-0"] * 3


def test_a_prompt_pipeline_that_comes_back_begins_without_load() -> None:
    requests, sent = router_with_two_pipelines()
    for name in ("token-0", "token-1"):
        requests.dispatch.pipelines[name].is_colocated = False
    requests.dispatch.pipeline_published(pipeline("prompt-0", 3))
    requests.dispatch.pipeline_ready(requests.dispatch.pipelines["prompt-0"], PipelineReady("prompt-0", 3, 1000))
    come_back(requests, "r", [])
    assert requests.dispatch.pipelines["prompt-0"].load_tokens == 3
    requests.dispatch.pipeline_published(pipeline("prompt-0", 5, successor="token-2"))
    requests.dispatch.pipeline_published(pipeline("prompt-0", 8))
    requests.cancel("r")
    assert requests.dispatch.pipelines["prompt-0"].load_tokens == 0
    assert len(sent.admitted) == 1, "its token driver sees to another prompt pipeline"


def test_a_long_sequence_goes_where_it_fits() -> None:
    requests, sent = router_with_two_pipelines()
    requests.dispatch.pipelines["token-0"].capacity_tokens = 10
    come_back(requests, "r", [])
    come_back(requests, "s", [])
    assert [name for name, _ in sent.admitted] == ["token-1-stage-0"] * 2


def test_who_has_outgrown_every_prompt_pipeline_is_placed_all_the_same() -> None:
    requests, sent = router_with_two_pipelines()
    for name in ("token-0", "token-1"):
        requests.dispatch.pipelines[name].is_colocated = False
    for name, capacity in (("prompt-0", 4), ("prompt-1", 3)):
        requests.dispatch.pipeline_published(pipeline(name, 3))
        requests.dispatch.pipeline_ready(requests.dispatch.pipelines[name], PipelineReady(name, 3, capacity))
    come_back(requests, "r", [8])
    come_back(requests, "s", [8, 9])
    requests.dispatch.pipeline_ready(requests.dispatch.pipelines["token-0"], PipelineReady("token-0", 8, 1000))
    admitted = [(admit.sequence_id.split("/")[0], admit.prompt_pipeline) for _, admit in sent.admitted]
    assert admitted == [("r", "prompt-0"), ("s", "prompt-1"), ("r", "prompt-0")]


def test_who_is_silent_is_not_told_that_it_is_given_up() -> None:
    """It would take that for the end, though it may only have been busy; it asks again when it is heard again."""
    requests, sent = router_with_two_pipelines()
    clients = Clients()
    come_back(requests, "r", [])
    clients.heard(b"client", 0.0)
    requests.client_gone(b"client")
    clients.gone(b"client", had_requests=True)
    assert not [message for message in sent.told if isinstance(message, Ended)]
    assert [clients.is_back(b"other"), clients.is_back(b"client"), clients.is_back(b"client")] == [False, True, False]
    come_back(requests, "r", [8])
    assert len(sent.admitted) == 2


def test_a_request_that_came_twice_while_it_was_tokenised_is_one() -> None:
    requests, sent = router_with_two_pipelines()
    submit = Submit("r", [5, 6, 7], SamplingParams())
    assert requests.precheck(b"client", submit) and requests.precheck(b"client", submit)
    requests.accept(b"client", submit, [5, 6, 7])
    requests.accept(b"client", submit, [5, 6, 7])
    assert [type(message) for message in sent.told] == [Accepted, Accepted]
    assert len(sent.admitted) == 1


def produce(requests: Requests, sequence_id: str, *indexes: int) -> None:
    tokens = [ProducedToken(sequence_id, index, Drawn(9)) for index in indexes]
    requests.tokens_produced(TokensProduced("token-0", 7, tokens))


def test_a_missing_token_is_asked_for_at_once_and_then_from_time_to_time() -> None:
    requests, sent = router_with_two_pipelines()
    come_back(requests, "r", [])
    sequence_id = sent.admitted[0][1].sequence_id
    produce(requests, sequence_id, 0, 2, 3)
    asked = [("token-0-stage-0", TokensAwaited(7, [(sequence_id, 1)]))]
    assert sent.take() == asked
    requests.dispatch.ask_again()
    assert sent.take() == asked
    produce(requests, sequence_id, 1, 2, 3)
    requests.dispatch.ask_again()
    assert sent.take() == [] and requests.ledger.sequence(sequence_id) is not None


def test_what_a_pipeline_has_lost_sight_of_is_admitted_there_again_once() -> None:
    requests, sent = router_with_two_pipelines()
    come_back(requests, "r", [])
    sequence_id = sent.admitted[0][1].sequence_id
    produce(requests, sequence_id, 0)
    requests.dispatch.pipelines["token-0"].load_tokens += 1000
    for _ in range(2):
        requests.dispatch.sequences_unknown(SequencesUnknown("token-0", 7, [sequence_id]))
    (_, first), (name, again) = sent.admitted
    assert name == "token-0-stage-0" and again.forced == b"\x09\0\0\0" and again.placed > first.placed
    assert again.sequence_id != first.sequence_id and again.sequence_id.startswith("r/0/me.")


def test_where_a_sequence_was_is_not_forgotten_with_a_lost_admission() -> None:
    requests, sent = router_with_two_pipelines()
    come_back(requests, "r", [])
    requests.dispatch.pipeline_lost("token-0")
    requests.dispatch.move_from("token-0")
    requests.dispatch.sequences_unknown(SequencesUnknown("token-1", 7, [sent.admitted[1][1].sequence_id]))
    assert [(name, admit.came_from) for name, admit in sent.admitted] == [
        ("token-0-stage-0", ""),
        ("token-1-stage-0", "token-0"),
        ("token-1-stage-0", "token-0"),
    ]


def test_only_what_this_router_has_named_itself_is_told_to_end() -> None:
    """A pipeline may still speak to the dead one that had our name: what it says of is somebody else's by now."""
    requests, sent = router_with_two_pipelines()
    come_back(requests, "r", [])
    sequence_id = sent.admitted[0][1].sequence_id
    requests.cancel("r")
    told = [("token-0-stage-0", CancelSequence(sequence_id))]
    assert sent.take() == told
    produce(requests, sequence_id, 0)
    produce(requests, "r/0/me-before.1", 0)
    assert sent.take() == told
