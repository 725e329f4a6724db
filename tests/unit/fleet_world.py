"""Several pipelines of each kind, stores, routers and clients: what they send each other keeps its order per sender and
receiver, everything else happens in any order. Processes die, live on cut off, and change their roles."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, cast

from common.kv.lane import HandoffSpan
from common.membership import MemberJoined, MemberLost, MemberRecord, PipelineRecord, SnapshotEnd
from common.messages import (
    Admit,
    Message,
    PipelineReady,
    StageReady,
    TokensAwaited,
    decode_stage_inbox,
    encode,
    pack_ids,
)
from common.replica_messages import Replicate, Replicated, replica_key
from common.stage.options import StageOptions
from dejavu.params import SamplingParams
from dejavu.wire import Ended, RouterMessage, Submit, Tokens
from services.router.pipelines import is_spare, missing_pipelines
from services.token_stage.scheduler import TokenScheduler
from services.token_stage.sequence import Phase, Produce
from tests.unit.fleet_router import FleetRouter
from tests.unit.fleet_stages import (
    NUM_LAYERS,
    FleetPromptStage,
    FleetTokenStage,
    Stage,
    stage_options,
)
from tests.unit.fleet_store import FleetStore
from tests.unit.made_up_kv import BLOCK_SIZE, next_token
from tests.unit.test_whole_system import Client

ROLES: dict[str, Any] = {"token_stage": FleetTokenStage, "prompt_stage": FleetPromptStage}
Cut = list[tuple[int, int]]
WHOLE: Cut = [(0, NUM_LAYERS)]
CUTS: list[Cut] = [WHOLE, [(0, 1), (1, 3)], [(0, 2), (2, 3)]]
"""the layers of a pipeline's stages"""


Process = FleetRouter | FleetStore | FleetTokenStage | FleetPromptStage


class Fleet:
    """`processes` by incarnation; `cut_off` are those that others take for dead and that live on."""

    leader: FleetRouter

    def __init__(self, seed: int, num_token: int, num_prompt: int, cuts: list[Cut] | None = None) -> None:
        """Each pipeline has one of `cuts` (None: a single stage)."""
        self.draws = random.Random(seed)
        self.renames = False
        """whoever is started again has another name than the one before it"""
        self.cuts: dict[str, Cut] = {}
        self.now_s = 0.0
        self.loses: Callable[[Message], bool] = lambda message: False
        """whether a message goes nowhere, with the connection that it was on"""
        self.num_news = 0
        """messages so far that somebody waits for"""
        self.revision = self.num_started = self.num_restored = self.num_moved = 0
        self.processes: dict[str, Process] = {}
        self.members: dict[str, MemberRecord] = {}
        self.records: dict[str, PipelineRecord] = {}
        self.broken: set[str] = set()
        self.cut_off: dict[str, Process] = {}
        self.agenda: list[Callable[[], None]] = []
        """what follows some time after a fault"""
        self.leaving: list[Stage] = []
        """stages whose pipeline is over"""
        self.wire: dict[tuple[str, str], deque[tuple[str, bytes]]] = {}
        self.news: dict[tuple[str, str], deque[object]] = defaultdict(deque)
        self.clients: dict[str, Client] = {}
        self.to_clients: deque[tuple[str, str, RouterMessage]] = deque()
        self.from_clients: deque[tuple[str, str]] = deque()
        self.homes: dict[str, tuple[str, int]] = {}
        """the driver and the epoch that each sequence was last given to, by its key"""
        self.shown: dict[object, int] = defaultdict(int)
        """so many of its tokens were shown when they were safe"""
        for name in ("router-0", "router-1"):
            self.start(name, "router")
        self.lead(self.routers[0], "")
        for name in ("store-a", "store-b"):
            self.start(name, "cache_store")
        for number in range(num_token):
            self.start_pipeline(f"token-{number}", "token_stage", cuts)
        for number in range(num_prompt):
            self.start_pipeline(f"prompt-{number}", "prompt_stage", cuts)
        self.agenda.append(self.publish)

    def start_pipeline(self, pipeline: str, role: str, cuts: list[Cut] | None) -> None:
        self.cuts[pipeline] = WHOLE if cuts is None else self.draws.choice(cuts)
        for index in range(len(self.cuts[pipeline])):
            self.start_stage(pipeline, role, index)

    # ------------------------------------------------------------ who is there

    @property
    def routers(self) -> list[FleetRouter]:
        return [process for process in self.processes.values() if type(process) is FleetRouter]

    def stages(self, kind: type[Stage]) -> list[Any]:
        return [process for process in self.processes.values() if type(process) is kind]

    @property
    def stores(self) -> list[FleetStore]:
        return [process for process in self.processes.values() if type(process) is FleetStore]

    def store_named(self, name: str) -> FleetStore | None:
        return next((store for store in self.stores if store.name == name), None)

    def token_stage(self, incarnation: str) -> FleetTokenStage | None:
        found = self.processes.get(incarnation)
        return found if isinstance(found, FleetTokenStage) else None

    def is_alive(self, stage: Stage) -> bool:
        return stage.incarnation in self.processes or stage.incarnation in self.cut_off

    def start_stage(self, pipeline: str, role: str, index: int = 0, *, is_standby: bool = False) -> None:
        """Under the name of the one before it, unless they are renamed."""
        name = f"{pipeline}-{self.num_started if self.renames else index}{'-standby' * is_standby}"
        cut = self.cuts.setdefault(pipeline, WHOLE)
        options = stage_options(name, pipeline, role, index, cut, is_standby=is_standby)
        self.cuts[options.other_pipeline] = cut
        self.start(name, role, options)

    def start(self, name: str, role: str, options: StageOptions | None = None) -> None:
        """It registers, and hears of everybody."""
        self.num_started += 1
        incarnation = f"i{self.num_started}"
        detail: dict[str, str | int | float] = {}
        process: Process
        if role == "router":
            process = FleetRouter(self, name, incarnation)
        elif role == "cache_store":
            process = FleetStore(self, name, incarnation)
        else:
            assert options is not None
            process = ROLES[role](self, options, incarnation)
            detail = {"other_pipeline": options.other_pipeline}
            if isinstance(process, FleetTokenStage):
                detail["kv_offer"] = process.door.offer
        place = (None, None, None, None)
        if options is not None:
            place = (options.pipeline, options.stage_index, options.num_stages, options.layers)  # type: ignore[assignment]
        state = "standby" if options is not None and options.is_standby else "active"
        record = MemberRecord(name, role, incarnation, 1, "h", f"tcp://{incarnation}:1", *place, state, detail)
        self.processes[incarnation] = process
        for member in self.members.values():
            self.tell(process, "members", MemberJoined(member))
        self.tell(process, "members", SnapshotEnd())
        for known in self.records.values():
            self.tell(process, "pipelines", known)
        self.members[name] = record
        self.tell_all("members", MemberJoined(record))

    def end(self, process: Process, *, lives_on: bool = False) -> None:
        """Its lease is gone. What it has sent arrives, or the last of it does not."""
        name, incarnation = self._name(process), process.incarnation
        del self.processes[incarnation]
        if lives_on:
            self.cut_off[incarnation] = process
        else:
            self.forget(incarnation)
        record = self.members.pop(name)
        if record.pipeline is not None and not is_spare(record, self.records):
            self.broken.add(record.pipeline)
        self.tell_all("members", MemberLost(record))

    def forget(self, incarnation: str) -> None:
        self.cut_off.pop(incarnation, None)
        for key in [key for key in self.wire if incarnation in (key[0].rpartition(".")[2], key[1])]:
            sent = self.wire[key]
            for _ in range(len(sent) if key[1] == incarnation else self.draws.randint(0, len(sent))):
                sent.pop()
            if not sent:
                del self.wire[key]
        for kind in ("members", "pipelines"):
            self.news.pop((incarnation, kind), None)

    def _name(self, process: Process) -> str:
        return process.options.name if isinstance(process, Stage) else process.name

    def tell(self, process: Process, kind: str, event: object) -> None:
        self.news[process.incarnation, kind].append(event)

    def tell_all(self, kind: str, event: object) -> None:
        for process in self.processes.values():
            self.tell(process, kind, event)

    def publish(self) -> None:
        """As the leader does."""
        for record in missing_pipelines(self.members.values(), self.records, (), self.broken):
            self._publish(record)

    def _publish(self, record: PipelineRecord) -> None:
        self.revision += 1
        record = PipelineRecord(record.pipeline, record.role, self.revision, record.stages, record.successor)
        self.records[record.pipeline] = record
        self.broken.discard(record.pipeline)
        self.tell_all("pipelines", record)

    def retire(self, stage: Stage) -> None:
        """Its pipeline is over; its process goes on in the other role."""
        record = self.records[stage.options.pipeline]
        self._publish(PipelineRecord(record.pipeline, record.role, 0, record.stages, stage.options.other_pipeline))

    def lead(self, router: FleetRouter, after: str) -> None:
        follows = self.leader.requests.dispatch._leads_since if after else 0
        self.leader = router
        router.cluster.is_leader = True
        self.revision += 1
        router.requests.dispatch.lead(self.revision, follows)
        if after:
            router.requests.dispatch.succeed(after)
        for name, client in self.clients.items():
            if not client.outcome:
                self.from_clients.append((router.incarnation, name))

    def admitted(self, driver: str, admit: Admit) -> None:
        """A router has given a sequence to a pipeline."""
        key = replica_key(admit.sequence_id)
        self.num_moved += self.homes.get(key, (driver, 0))[0] != driver
        self.homes[key] = (driver, admit.epoch)

    # ------------------------------------------------------------ what is on its way

    def remind(self, after_s: float) -> None:
        """Stages and routers say and ask again what others may not have heard."""
        self.now_s += after_s
        for process in [*self.processes.values(), *self.cut_off.values()]:
            if not isinstance(process, FleetStore):
                process.remind()

    def send(self, sender: str, to: str, message: Message) -> None:
        # that all is well is said for ever, and how it is with those that wait is asked
        self.num_news += not isinstance(message, StageReady | PipelineReady | TokensAwaited)
        if (to in self.processes or to in self.cut_off) and not self.loses(message):
            self.wire.setdefault((sender, to), deque()).append((sender, encode(message)))

    def happen(self, draws: random.Random) -> bool:
        """One of the things that can happen does; False: nothing can."""
        found: list[tuple[Any, ...]] = [(self._arrive, to, sent) for (_, to), sent in self.wire.items() if sent]
        for (incarnation, kind), events in self.news.items():
            if events and (process := self.processes.get(incarnation)) is not None and process.can_hear(kind):
                found.append((self._news_arrive, process, kind, events))
        for process in (*self.processes.values(), *self.cut_off.values()):
            found += [(way,) for way in process.ways()]
        found += [(self._reach_client,)] * bool(self.to_clients) + [(self._hear_client,)] * bool(self.from_clients)
        if found:
            way, *arguments = draws.choice(found)
            way(*arguments)
        return bool(found)

    def _news_arrive(self, process: Process, kind: str, events: deque[object]) -> None:
        process.hear(kind, events.popleft())

    def _arrive(self, to: str, sent: deque[tuple[str, bytes]]) -> None:
        sender, frame = sent.popleft()
        process = self.processes.get(to) or self.cut_off.get(to)
        if process is not None:
            process.arrive(sender, frame)

    def _scheduler_of(self, stage: FleetTokenStage) -> TokenScheduler | None:
        """That of the driver which lends the blocks of this stage, in its epoch."""
        driver: Any = stage
        if not stage.options.is_driver and stage.record is not None:
            incarnation = stage.record.stages[0].incarnation
            driver = self.processes.get(incarnation) or self.cut_off.get(incarnation)
        if driver is None or driver.driver is None or driver.epoch != stage.epoch:
            return None
        return cast(TokenScheduler, driver.driver.scheduler)

    def check_write(self, stage: FleetTokenStage, span: HandoffSpan) -> None:
        """Nobody else has the blocks that are being written to."""
        scheduler = self._scheduler_of(stage)
        sequences = {} if scheduler is None else scheduler.table.sequences
        first, last = (position // BLOCK_SIZE for position in (span.token_range[0], span.token_range[1] - 1))
        touched = set(span.destination_blocks[first : last + 1])
        for other in sequences.values():
            if (other.sequence_id, other.attempt) != (span.sequence_id, span.attempt):
                assert not touched & set(other.blocks), "a block was given away that somebody still writes to"

    def check_blocks(self) -> None:
        """Nobody else has the blocks that a store is to read, or a stage to copy into."""
        for store in self.stores:
            for _, message in store.inbox:
                stage = next(iter(store.sources.get(getattr(message, "pipeline", ""), ())), None)
                if isinstance(message, Replicate) and stage is not None and self._reads(store, message, stage):
                    self._check_lent(stage, [(item.key, item.blocks) for item in message.items])
        for stage in self.stages(FleetTokenStage):
            pulls = [pull for pull in stage.pulls.waiting if pull.epoch == stage.epoch]
            self._check_lent(stage, [(replica_key(pull.sequence_id), pull.blocks) for pull in pulls])

    def _reads(self, store: FleetStore, message: Replicate, stage: FleetTokenStage) -> bool:
        """Not what is of an older epoch, or was repeated and has been read before."""
        is_current = store.shelf.accepts(message.pipeline, message.epoch) and stage.epoch == message.epoch
        return is_current and message.batch > store.shelf._sessions[message.pipeline].batch

    def _check_lent(self, stage: FleetTokenStage, touched: list[tuple[str, list[int]]]) -> None:
        scheduler = self._scheduler_of(stage)
        if scheduler is None:
            return
        scheduler.table.allocator.check()
        lent: dict[int, str] = {}
        for sequence in scheduler.table.sequences.values() if touched else ():
            lent |= dict.fromkeys(sequence.blocks, replica_key(sequence.sequence_id))
        for key, blocks in touched:
            assert all(lent.get(block, key) == key for block in blocks), f"blocks of {key} were given away too early"

    def check_safe(self, stage: FleetTokenStage, scheduler: TokenScheduler, produced: Produce) -> None:
        """A token is shown: a store has the KV before it, but for what may lag, or none can have it."""
        sequence = scheduler.table.sequences.get(produced.sequence_id)
        if sequence is None or sequence.max_lag is None or sequence.phase is Phase.ENDED:
            return
        key, tokens = replica_key(produced.sequence_id), sequence.tokens[: sequence.num_prompt + produced.index]
        home = stage.options.name, stage.epoch
        if produced.index < max(self.shown[key], self.shown[key, home]):
            return  # again, to a new router; what came before was safe then
        self.shown[key, home] = produced.index + 1
        if self.homes.get(key) != home:
            return  # nobody shows it: a new router has given the sequence to others
        self.shown[key] = produced.index + 1
        kept = [store.shelf.locate(key, pack_ids(tokens), 0.0) for store in self.stores]
        is_safe = any(found is not None and found[1] >= len(tokens) - sequence.max_lag for found in kept)
        is_refused = any(key in store.refused for store in scheduler.table.replication._stores.values())
        is_refused |= any(key in refusal.failed for refusal in self._refusals(stage))
        if any(stage.members.get(name) != self.members.get(name) for name in scheduler.table.replication._stores):
            return  # it has not heard of a store's death yet
        assert is_safe or is_refused or not scheduler.table.replication.num_stores, "a token was shown that is not safe"

    def _refusals(self, stage: FleetTokenStage) -> list[Replicated]:
        """What stores have said, and the stage has not heard yet."""
        frames = [frame for (_, to), sent in self.wire.items() if to == stage.incarnation for _, frame in sent]
        messages = [decode_stage_inbox(frame) for frame in frames]
        return [message for message in messages if isinstance(message, Replicated)]

    # ------------------------------------------------------------ clients

    def submit(self, name: str, num_prompt: int, max_tokens: int) -> None:
        prompt = [self.draws.randrange(1, 90) for _ in range(num_prompt)]
        num_choices = self.draws.choice((1, 1, 2))
        durability = self.draws.choice(["async", "lag:3", "sync"])
        params = SamplingParams(max_tokens=max_tokens, durability=durability, n=num_choices, ignore_eos=True, seed=1)
        self.clients[name] = Client(prompt, params, [[] for _ in range(num_choices)])
        self.from_clients.append((self.leader.incarnation, name))

    def _hear_client(self) -> None:
        incarnation, name = self.from_clients.popleft()
        client = self.clients[name]
        if incarnation == self.leader.incarnation and not client.outcome:
            known = [list(ids) for ids in client.delivered]
            self.leader._submissions.submit(name.encode(), Submit(name, client.prompt, client.params, known))

    def _reach_client(self) -> None:
        incarnation, name, message = self.to_clients.popleft()
        client = self.clients[name]
        if incarnation != self.leader.incarnation:
            return
        for frame in message.frames if isinstance(message, Tokens) else ():
            known = client.delivered[frame.choice]
            assert frame.index == len(known), "a token is missing, or came twice"
            assert frame.token_id == next_token(client.prompt + known), "a token diverges"
            known.append(frame.token_id)
        if isinstance(message, Ended):
            assert client.outcome in ("", "left"), "it ended twice"
            client.outcome = client.outcome or message.outcome
