"""What can go wrong with a link.

LinkError
 ├─ LinkRefused   the two sides do not fit together, or the token is wrong; trying again is no use
 ├─ LinkTimeout   the deadline passed; the peer may be frozen, and may wake up again
 ├─ LinkLost      the connection broke, or the link was closed
 ├─ LinkFull      there is no room on the disk
 └─ LinkDamaged   what was stored is torn or corrupt; nothing of it was handed out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from dejavu.errors import DejavuError


class LinkError(DejavuError):
    """`may_still_write`: bytes that were sent before may yet reach the peer's pool, so the blocks they were
    meant for must not be given to anybody else (see `Link.aclose`). Of a hand-off `unconfirmed` says what the owners
    have to fence off (`PoolServer.fence`) before they can."""

    code: ClassVar[str] = "link_error"

    def __init__(
        self, message: str, *, may_still_write: bool = False, unconfirmed: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(message)
        self.may_still_write = may_still_write
        self.unconfirmed: Mapping[str, int] = unconfirmed or {}


class LinkRefused(LinkError):
    code = "link_refused"


class LinkTimeout(LinkError):
    code = "link_timeout"


class LinkLost(LinkError):
    code = "link_lost"


class LinkFull(LinkError):
    code = "link_full"


class LinkDamaged(LinkError):
    code = "link_damaged"
