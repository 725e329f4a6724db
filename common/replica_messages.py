"""What drivers, stages and cache stores say to each other about replicas.

A *replica* is the KV of a sequence's first tokens, for all layers, in a store. It is named by its *key*, the sequence
id without the router's term ("request_id/choice"): what it holds depends on token ids alone, so it outlives the
pipeline, the epoch and the router that it was made under. Token ids travel as packed little-endian int32.
"""

from __future__ import annotations

import msgspec

Placed = tuple[int, int]
"""When a sequence was given to a token pipeline: the etcd revision since which the router leads that gave it, and which
one of that router's gifts it was. Of two pipelines that know a sequence the one with the greater pair has it now."""
NEVER: Placed = (0, 0)


def replica_key(sequence_id: str) -> str:
    """The key of a sequence's replica."""
    return sequence_id.rpartition("/")[0]


class ReplicaItem(msgspec.Struct, frozen=True, array_like=True):
    """Tokens [start, start + num_tokens) of a sequence have KV in `blocks`, which hold exactly these tokens from slot
    `start` modulo the block size on. `token_ids` are the ids from `start` to the newest known, computed or not."""

    key: str
    start: int
    num_tokens: int
    blocks: list[int]
    token_ids: bytes
    placed: Placed = NEVER


class HeldReplica(msgspec.Struct, frozen=True, array_like=True):
    """What a store has of a sequence; `blocks` in the store's pool, from token 0. Checksums are per layer, so that
    stages of any cut can check what they copy."""

    num_tokens: int
    blocks: list[int]
    checksums: list[int]
    """one per layer of the model"""


# ---------------------------------------------------------------- to a store


class Claim(msgspec.Struct, frozen=True, array_like=True, tag="claim"):
    """Token driver to stores and prompt stages: an epoch begins, or the receiver is back that was taken for dead in it.
    Once it is answered, the receiver touches none of the pipeline's pools on behalf of an older epoch, or of a batch up
    to `batch`."""

    pipeline: str
    epoch: int
    batch: int = 0


class Replicate(msgspec.Struct, frozen=True, array_like=True, tag="replicate"):
    """Token driver: drop the replicas `over`, whose sequences have ended, then copy `items` from the pipeline's pools.
    Nobody writes there until it is answered, or the store is taken for dead. `batch` rises; a store is sent the next
    one when it has answered the one before."""

    pipeline: str
    epoch: int
    batch: int
    items: list[ReplicaItem]
    over: list[str] = []


class Locate(msgspec.Struct, frozen=True, array_like=True, tag="locate"):
    """Token driver: what is there of a sequence with these token ids?"""

    pipeline: str
    epoch: int
    sequence_id: str
    attempt: int
    token_ids: bytes
    placed: Placed = NEVER


# ---------------------------------------------------------------- to a stage


class Claimed(msgspec.Struct, frozen=True, array_like=True, tag="claimed"):
    """Answers `Claim`; a store with the keys of all replicas it has."""

    name: str
    pipeline: str
    epoch: int
    keys: list[str]


class Replicated(msgspec.Struct, frozen=True, array_like=True, tag="replicated"):
    """Store to token driver: the batch is over; of the sequences in `failed` nothing was kept."""

    store: str
    epoch: int
    batch: int
    failed: list[str]


class Located(msgspec.Struct, frozen=True, array_like=True, tag="located"):
    """Store to token driver: answers `Locate`; None: nothing that would help."""

    store: str
    epoch: int
    sequence_id: str
    attempt: int
    held: HeldReplica | None


class Pull(msgspec.Struct, frozen=True, array_like=True, tag="pull"):
    """Driver to each stage of its pipeline: copy your layers of tokens [0, num_tokens) from `store_blocks` of a store's
    pool into `blocks` of yours. `checksums` are those of these layers. It is sent again, under the same `number`, until
    it is answered; a stage copies once."""

    epoch: int
    sequence_id: str
    attempt: int
    store: str
    num_tokens: int
    store_blocks: list[int]
    blocks: list[int]
    token_hash: bytes
    checksums: list[int]
    number: int = 0


class Pulled(msgspec.Struct, frozen=True, array_like=True, tag="pulled"):
    """Stage to its driver: a `Pull` is over; `intact` if the bytes are there and are what the store was given."""

    epoch: int
    sequence_id: str
    attempt: int
    intact: bool
    stage_index: int = 0
    number: int = 0
