"""Clients, routers, drivers and stores in any order of messages: whatever dies, every request ends once, with its
tokens."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from common.membership import MemberRecord, PipelineRecord
from common.messages import Admit, CancelSequence, Message, Orphans, PipelineReady, ProducedToken, TokensProduced
from common.messages import unpack_ids as unpack
from common.model.spec import load_spec
from common.replica_messages import replica_key
from common.stage.role import Sender
from dejavu.params import SamplingParams
from dejavu.wire import Ended, RouterMessage, Submit, TokenFrame, Tokens
from services.router.requests import Requests
from services.router.status import Journal
from services.token_stage.audience import Audience
from services.token_stage.sequence import Action, Fail, Produce
from tests.unit.made_up_kv import next_token
from tests.unit.test_prompt_recovery import NUM_PROMPT_BLOCKS, TwoPipelines, run_one

SPEC = load_spec("models/tiny")
NUM_BLOCKS = 40


@dataclass
class Client:
    """What somebody who asked has got, by choice."""

    prompt: list[int]
    params: SamplingParams
    delivered: list[list[int]] = field(default_factory=list)
    outcome: str = ""


class Router:
    """The real one's decisions; what it sends waits in the world."""

    def __init__(self, name: str, world: WholeSystem) -> None:
        self.name = name
        self._world = world
        self.requests = Requests(SPEC, None, self, Journal(), name)

    def to_client(self, client: bytes, message: RouterMessage) -> None:
        self._world.to_clients.append((self.name, client.decode(), message))

    def to_member(self, name: str, message: Message) -> bool:
        if isinstance(message, Admit):
            self._world.admitted[replica_key(message.sequence_id)] = message.epoch
        self._world.to_driver.append((self.name, message))
        return True


class WholeSystem(TwoPipelines):
    """The two pipelines with a leading router in front, and clients that go on with its successor."""

    def __init__(self, seed: int) -> None:
        self.clients: dict[str, Client] = {}
        self.num_routers = 0
        self.router: Router
        self.admitted: dict[str, int] = {}
        """the epoch to which each sequence was last given, by its key"""
        self.to_clients: deque[tuple[str, str, RouterMessage]] = deque()
        self.to_driver: deque[tuple[str, Message]] = deque()
        self.to_router: deque[tuple[str, Message]] = deque()
        self.from_clients: deque[tuple[str, str]] = deque()
        self.news: list[str] = []
        """routers whose death the driver has not heard of"""
        self.audience = Audience()
        self.new_router()
        super().__init__(seed, NUM_BLOCKS)

    # ------------------------------------------------------------ faults

    def new_router(self) -> None:
        """The first, or the one that leads after the last has died: nothing that this one had sent arrives any more."""
        if self.num_routers:
            self.news.append(self.router.name)
            dead = self.router.name
            self.to_clients = deque(each for each in self.to_clients if each[0] != dead)
            self.to_router.clear()
        self.num_routers += 1
        self.router = Router(f"router-{self.num_routers}", self)
        if self.num_routers > 1:
            self.publish()
            self.router.requests.dispatch.succeed(dead)
            for name, client in self.clients.items():
                if not client.outcome and self.draws.random() < 0.25:
                    client.outcome = "left"
                elif not client.outcome:
                    self.from_clients.append((self.router.name, name))

    def lose_token_stage(self) -> None:
        """Its death is known; the next epoch is still to come."""
        self.token.intake.stage_lost("1")
        self.prompt_actions(self.prompt.cancel_older("token-0", self.epoch + 1))

    def begin_epoch(self) -> None:
        super().begin_epoch()
        self.audience = Audience()
        self.publish()

    def begin_prompt_epoch(self) -> None:
        super().begin_prompt_epoch()
        self.publish()

    def publish(self) -> None:
        """Every router hears of the pipelines, and later from their drivers that they are ready."""
        for role, epoch in (("prompt", self.prompt_epoch), ("token", getattr(self, "epoch", 0))):
            name = f"{role}-0"
            stage = MemberRecord(name, f"{role}_stage", "1", 1, "h", "", name, 0, 1, (0, 1), "active", {})
            self.router.requests.dispatch.pipeline_published(PipelineRecord(name, f"{role}_stage", epoch, (stage,)))
            self.to_router.append((self.router.name, PipelineReady(name, epoch, 4000)))

    # ------------------------------------------------------------ clients

    def submit(self, name: str, num_prompt: int, max_tokens: int) -> None:
        prompt = [self.draws.randrange(1, 90) for _ in range(num_prompt)]
        durability = self.draws.choice(["async", "lag:3", "sync"])
        num_choices = self.draws.choice((1, 1, 2))
        params = SamplingParams(max_tokens=max_tokens, durability=durability, n=num_choices, ignore_eos=True, seed=1)
        self.requests[name] = prompt
        self.clients[name] = Client(prompt, params, [[] for _ in range(num_choices)])
        self.from_clients.append((self.router.name, name))

    def leave(self, name: str) -> None:
        """A client is gone."""
        if not self.clients[name].outcome:
            self.clients[name].outcome = "left"
            self.router.requests.client_gone(name.encode())

    def hear_client(self) -> None:
        router, name = self.from_clients.popleft()
        client = self.clients[name]
        if router != self.router.name or client.outcome:
            return
        submit = Submit(name, client.prompt, client.params, [list(ids) for ids in client.delivered])
        if self.router.requests.precheck(name.encode(), submit):
            self.router.requests.accept(name.encode(), submit, client.prompt)

    def reach_client(self) -> None:
        _, name, message = self.to_clients.popleft()
        client = self.clients[name]
        if isinstance(message, Tokens):
            for frame in message.frames:
                known = client.delivered[frame.choice]
                assert frame.index == len(known), "a token is missing, or came twice"
                assert frame.token_id == next_token(client.prompt + known)
                known.append(frame.token_id)
        elif isinstance(message, Ended):
            assert client.outcome in ("", "left"), "it ended twice"
            client.outcome = client.outcome or message.outcome

    # ------------------------------------------------------------ the token driver's wiring

    def admit(self, name: str, prompt: list[int]) -> None:
        """Only routers admit anything here."""

    def reach_driver(self) -> None:
        router, message = self.to_driver.popleft()
        if isinstance(message, CancelSequence):
            sequence_id = self.audience.called(message.sequence_id)
            if sequence_id is not None:
                self.carry_out(self.token.admissions.cancel(sequence_id))
                self.audience.leave(sequence_id)
        elif isinstance(message, Admit) and message.epoch == self.epoch:
            prompt, forced = unpack(message.prompt), unpack(message.forced)
            adopted = self.token.admissions.adopt(message.sequence_id, prompt, forced, message.params)
            sequence_id = message.sequence_id if adopted is None else adopted[0]
            self.audience.enter(sequence_id, message, Sender(router, "1"))
            self.num_adopted += adopted is not None
            self.carry_out(
                self.token.admissions.admit(sequence_id, message.choice, prompt, forced, message.params)
                if adopted is None
                else adopted[1]
            )

    def hear_of_death(self) -> None:
        """The driver notices that a router is gone."""
        router = self.news.pop()
        for sequence_id in self.audience.of_router(Sender(router, "1")):
            self.token.admissions.orphan(sequence_id)
        keys = [replica_key(sequence_id) for sequence_id in self.token.admissions.orphans()]
        self.to_router.append((self.router.name, Orphans("token-0", self.epoch, router, keys)))

    def carry_out(self, actions: Iterable[Action], *, were_shown: bool = False) -> None:
        others: list[Action] = []
        for action in actions:
            listener = self.audience.of(action.sequence_id)
            if listener is None:
                continue
            assert not isinstance(action, Fail), action
            if not isinstance(action, Produce):
                others.append(action)
                continue
            token = ProducedToken(listener.admit.sequence_id, action.index, action.drawn, action.finish_reason)
            self.to_router.append((listener.router.name, TokensProduced("token-0", self.epoch, [token])))
            if action.finish_reason:
                self.audience.leave(action.sequence_id)
        super().carry_out(others)

    def reach_router(self) -> None:
        """The oldest message of one of those who have sent any: who drove an older epoch may be heard late."""
        sender = self.draws.choice(sorted({_sender(message) for _, message in self.to_router}))
        picked = next(each for each in self.to_router if _sender(each[1]) == sender)
        self.to_router.remove(picked)
        name, message = picked
        if name != self.router.name:
            return
        requests = self.router.requests
        if isinstance(message, PipelineReady):
            view = requests.dispatch.pipelines[message.pipeline]
            if view.epoch <= message.epoch:
                requests.dispatch.pipeline_ready(view, message)
        elif isinstance(message, Orphans):
            requests.dispatch.orphans_found(message)
        elif isinstance(message, TokensProduced):
            num_before = len(self.to_clients)
            requests.tokens_produced(message)
            told = [message for _, _, message in list(self.to_clients)[num_before:] if isinstance(message, Tokens)]
            assert all(self.is_current(frame) for tokens in told for frame in tokens.frames), "a zombie was heard"

    def is_current(self, frame: TokenFrame) -> bool:
        """Whether it comes from the epoch that its sequence was last given to."""
        return frame.epoch == self.admitted[f"{frame.request_id}/{frame.choice}"]

    def let_time_pass(self) -> None:
        """What waits for a clock happens: nobody is waited for any longer."""
        self.router.requests.dispatch.stop_awaiting()
        for sequence_id in self.token.admissions.orphans():
            self.carry_out(self.token.admissions.cancel(sequence_id))
            self.audience.leave(sequence_id)

    def one_of_ours(self) -> bool:
        """Something between clients, routers and the driver happens; False: nothing can."""
        ways = [
            (self.from_clients, self.hear_client),
            (self.to_clients, self.reach_client),
            (self.to_driver, self.reach_driver),
            (self.to_router, self.reach_router),
            (self.news, self.hear_of_death),
        ]
        possible = [happen for queue, happen in ways if queue]
        if possible:
            self.draws.choice(possible)()
        return bool(possible)


def _sender(message: Message) -> tuple[str, int]:
    assert isinstance(message, PipelineReady | TokensProduced | Orphans)
    return message.pipeline, message.epoch


def inject(world: WholeSystem, fault: str) -> list[str]:
    """What must follow on it some time later."""
    match fault:
        case "prompt":
            world.lose_prompt_pipeline()
        case "token":
            world.lose_token_stage()
            return [world.draws.choice(["epoch", "epoch", "back"])]
        case "epoch":
            world.begin_epoch()
        case "back":
            world.carry_out(world.token.intake.stage_back("1"))
        case "router":
            world.new_router()
        case "damage" if world.stores:
            world.damage_store(world.draws.choice(sorted(world.stores)))
        case _ if world.stores:
            world.lose_store(sorted(world.stores)[0])
    return []


@pytest.mark.seeds(60)
def test_every_request_ends_once_with_its_tokens(seed: int) -> None:
    simulate(seed)


def simulate(seed: int) -> WholeSystem:
    """One run; raises `AssertionError` where something is lost, twice, wrong, stuck or leaked."""
    draws = random.Random(seed + 3000)
    world = WholeSystem(seed)
    to_submit = [(f"r{i}", draws.randrange(1, 80), draws.randrange(1, 25)) for i in range(15)]
    faults = draws.sample(["prompt"] * 2 + ["token"] * 2 + ["router"] * 3 + ["lose", "damage"], draws.randrange(8))
    for _ in range(100_000):
        if to_submit and draws.random() < 0.1:
            world.submit(*to_submit.pop())
        if world.clients and draws.random() < 0.002:
            world.leave(draws.choice(sorted(world.clients)))
        if faults and draws.random() < 0.01:
            faults += inject(world, faults.pop())
        happened = world.one_of_ours() if draws.random() < 0.5 else run_one(world, draws)
        if not happened and not world.one_of_ours() and not run_one(world, draws):
            world.let_time_pass()
            if not world.to_driver and not to_submit and not faults:
                break
    for name, client in world.clients.items():
        assert client.outcome in ("finished", "left"), f"{name} never ended"
        if client.outcome == "finished":
            assert all(len(ids) == client.params.max_tokens for ids in client.delivered)
    assert len(world.router.requests.ledger) == 0
    assert world.token.table.allocator.num_free == NUM_BLOCKS
    assert world.token.table.num_running == world.token.table.num_waiting == 0
    assert world.prompt.num_free == NUM_PROMPT_BLOCKS
    return world


def test_sequences_are_taken_over() -> None:
    """The runs above would say little if routers never took over what lives."""
    assert sum(simulate(seed).num_adopted for seed in range(100, 115)) > 10
