"""What can go wrong between us and etcd."""

from __future__ import annotations

from dejavu.errors import DejavuError


class EtcdError(DejavuError):
    """Base of everything the etcd client raises."""


class EtcdUnavailable(EtcdError):
    """etcd did not answer within the deadline. A write may have been applied all the same."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"etcd at {url} does not answer: {reason}")
        self.url = url


class EtcdCompacted(EtcdError):
    """The history that a watch wanted is gone (compacted, or the data was replaced): list the keys again."""


class EtcdLeaseNotFound(EtcdError):
    """The lease named in a write has expired or was revoked."""


class EtcdRequestFailed(EtcdError):
    """etcd refused the request for a reason that asking again does not change."""
