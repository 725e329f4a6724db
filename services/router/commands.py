"""What operators ask of a router: to drain a service, to convert a pipeline, to tell how things are."""

from __future__ import annotations

from common.loop_monitor import LoopMonitor
from dejavu import wire
from dejavu.errors import DejavuError
from services.router.cluster import Cluster
from services.router.conversion import end_of_pipeline
from services.router.requests import Requests, wire_error
from services.router.stats_queries import StatsQueries
from services.router.status import Journal, describe


class Commands:
    """Each returns what to answer. All but `status` are for the leader."""

    def __init__(
        self,
        name: str,
        cluster: Cluster,
        requests: Requests,
        journal: Journal,
        queries: StatsQueries,
        monitor: LoopMonitor,
    ) -> None:
        self._name = name
        self._monitor = monitor
        self._cluster = cluster
        self._requests = requests
        self._journal = journal
        self._queries = queries

    async def drain(self, drain: wire.Drain) -> wire.Drained:
        """Has the service replaced and ended; a router ends itself once it has answered."""
        try:
            await self._cluster.drain(drain.name)
        except DejavuError as reason:
            return wire.Drained(drain.query_id, wire_error(reason))
        return wire.Drained(drain.query_id)

    async def convert(self, convert: wire.Convert) -> wire.Converted:
        """Has the pipeline go on in the other role."""
        dispatch = self._requests.dispatch
        views, longest = dispatch.pipelines.values(), dispatch.longest_tokens(convert.pipeline)
        try:
            end = end_of_pipeline(convert.pipeline, convert.role, self._cluster.records, views, longest)
            await self._cluster.convert(end)
        except DejavuError as reason:
            return wire.Converted(convert.query_id, "", wire_error(reason))
        return wire.Converted(convert.query_id, str(end.successor))

    async def status(self, query_id: int) -> wire.StatusReply:
        """Asks stages and stores for their figures and answers with those that came in time."""
        members = self._cluster.members
        replies = await self._queries.ask(member.name for member in members.values() if member.role != "router")
        replies[self._name] = {"loop": self._monitor.figures(), "link": "zmq"}
        ledger = self._requests.ledger
        document = describe(
            members.values(),
            self._cluster.records,
            self._cluster.leader,
            self._requests.dispatch.pipelines.values(),
            replies,
            self._journal,
            {"requests": len(ledger), "sequences": ledger.num_sequences},
        )
        return wire.StatusReply(query_id, document)
