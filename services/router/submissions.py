"""How a request comes to the ledger: it may have to wait for a leader, or for its prompt to be tokenised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from dejavu.errors import DejavuError, Unavailable
from dejavu.wire import Ended, NotLeader, Submit
from services.router.clients import Clients
from services.router.dispatch import Wires
from services.router.held import HOLD_S, Held
from services.router.requests import LONG_TEXT_CHARS, Requests


class Submissions:
    """What `clients` submit to this router. `other_leader()` is where another router that leads listens for clients, ''
    where none is known to lead, None where this one does; `start(work)` runs work in the background."""

    def __init__(
        self,
        requests: Requests,
        clients: Clients,
        wires: Wires,
        other_leader: Callable[[], str | None],
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._requests = requests
        self._clients = clients
        self._wires = wires
        self._other_leader = other_leader
        self._start = start
        self._held = Held()
        self._tokenising: dict[tuple[bytes, str], asyncio.Task[None]] = {}
        """long prompts that are not in the ledger yet, by client and request"""
        self._is_closed = False

    def close(self) -> None:
        """Nothing new is let in any more."""
        self._is_closed = True

    def submit(self, client: bytes, submit: Submit) -> None:
        """Begins with a request, or joins one that lives; else its client is told why not, or who leads."""
        leader = self._other_leader()
        if leader is not None:
            self._send_to(leader, client, submit)
            return
        try:
            if not self._requests.precheck(client, submit):
                return
            if self._is_closed:
                raise Unavailable("the system is stopping")
            if isinstance(submit.prompt, str) and len(submit.prompt) > LONG_TEXT_CHARS:
                self._tokenise(client, submit)
                return
            self._requests.accept(client, submit, self._requests.tokenise(submit))
        except DejavuError as error:
            self._requests.refuse(client, submit.request_id, error)

    def cancel(self, client: bytes, request_id: str) -> None:
        """Ends a request, wherever it is."""
        tokenising = self._tokenising.pop((client, request_id), None)
        if tokenising is not None:
            tokenising.cancel()
        if tokenising is not None or self._held.take(client, request_id) is not None:
            self._wires.to_client(client, Ended(request_id, "cancelled"))
        self._requests.cancel(request_id)

    # ------------------------------------------------------------ without a leader

    def leader_changed(self) -> None:
        """Who has waited for a leader is heard again."""
        for client, submit in self._held.take_all():
            if client in self._clients:
                self.submit(client, submit)

    def _send_to(self, leader: str, client: bytes, submit: Submit) -> None:
        """Where the last one is gone, the request waits here for the next, for a while: we may be that."""
        if not leader and self._held.add(client, submit):
            asyncio.get_running_loop().call_later(HOLD_S, self.hold_no_longer, client, submit)
        else:
            self._wires.to_client(client, NotLeader(submit.request_id, leader))

    def hold_no_longer(self, client: bytes, submit: Submit) -> None:
        """Called when a request that may still wait has waited for `HOLD_S`."""
        if self._held.take(client, submit.request_id) is not None:
            self._wires.to_client(client, NotLeader(submit.request_id, self._other_leader() or ""))

    # ------------------------------------------------------------ long prompts

    def _tokenise(self, client: bytes, submit: Submit) -> None:
        key = client, submit.request_id
        task = self._start(self._accept_long(client, submit))
        self._tokenising[key] = task
        task.add_done_callback(lambda done: self._tokenising.pop(key) if self._tokenising.get(key) is done else None)

    async def _accept_long(self, client: bytes, submit: Submit) -> None:
        try:
            prompt_ids = await asyncio.to_thread(self._requests.tokenise, submit)
            self._requests.accept(client, submit, prompt_ids)
        except DejavuError as error:
            self._requests.refuse(client, submit.request_id, error)
