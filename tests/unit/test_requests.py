"""What a router does with requests that its predecessor had begun."""

from __future__ import annotations

from common.messages import Admit, Message, Orphans, PipelineReady
from common.model.spec import load_spec
from dejavu.params import SamplingParams
from dejavu.wire import RouterMessage, Submit
from services.router.placement import PipelineView
from services.router.requests import Requests
from services.router.status import Journal


class Sent:
    """Keeps what goes out."""

    def __init__(self) -> None:
        self.admitted: list[tuple[str, Admit]] = []

    def to_client(self, client: bytes, message: RouterMessage) -> None: ...

    def to_member(self, name: str, message: Message) -> bool:
        if isinstance(message, Admit):
            self.admitted.append((name, message))
        return True


def router_with_two_pipelines() -> tuple[Requests, Sent]:
    sent = Sent()
    requests = Requests(load_spec("models/tiny"), None, sent, Journal(), "me")
    for name in ("token-0", "token-1"):
        view = PipelineView(name, "token_stage", is_colocated=True, driver=f"{name}-stage-0")
        requests.pipelines[name] = view
        requests.pipeline_ready(view, PipelineReady(name, 7, 1000))
    return requests, sent


def come_back(requests: Requests, request_id: str, delivered: list[int]) -> None:
    submit = Submit(request_id, [5, 6, 7], SamplingParams(), [delivered])
    assert requests.precheck(b"client", submit)
    requests.accept(b"client", submit, [5, 6, 7])


def test_a_begun_request_goes_where_it_lives() -> None:
    requests, sent = router_with_two_pipelines()
    requests.succeed("router-0")
    come_back(requests, "r", [8, 9])
    requests.orphans_found(Orphans("token-0", 7, "router-0", []))
    assert sent.admitted == [], "token-1 may have it"
    requests.orphans_found(Orphans("token-1", 7, "router-0", ["r/0"]))
    assert [(name, admit.forced[:4]) for name, admit in sent.admitted] == [("token-1-stage-0", b"\x08\0\0\0")]


def test_new_requests_and_lost_pipelines_do_not_wait() -> None:
    requests, sent = router_with_two_pipelines()
    requests.orphans_found(Orphans("token-0", 7, "router-0", []))
    requests.succeed("router-0")
    come_back(requests, "new", [])
    come_back(requests, "begun", [8])
    assert [admit.sequence_id.split("/")[0] for _, admit in sent.admitted] == ["new"]
    requests.pipeline_lost("token-1")
    assert [(name, admit.sequence_id.split("/")[0]) for name, admit in sent.admitted[1:]] == [
        ("token-0-stage-0", "begun")
    ]


def test_a_silent_pipeline_is_not_waited_for_for_ever() -> None:
    requests, sent = router_with_two_pipelines()
    requests.succeed("router-0")
    come_back(requests, "r", [8])
    requests.stop_awaiting()
    assert len(sent.admitted) == 1
