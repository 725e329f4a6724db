"""Which tokens of which sequences are in which store, and what to send next (pure).

A store reads the stages' pools by itself when the driver tells it what is new, one batch at a time: while one is under
way news accumulate, so a slow store gets fewer and larger batches and never a queue. Blocks that are being read are not
given away. At the start of an epoch nothing is given away at all until every store and every prompt stage has said
that it touches nothing on behalf of an older one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.messages import REPEAT_S, pack_ids
from common.replica_messages import Claim, Locate, ReplicaItem, Replicate, replica_key
from services.token_stage.sequence import Sequence

MAX_BATCH_TOKENS = 1024
"""The store copies so many before it answers: what is drawn meanwhile has to wait, and is lost if a stage dies."""
FEW_TOKENS = 32
RETRY_BATCHES = 64
MIN_NEWS_TOKENS = 2

ToStore = tuple[str, Claim | Replicate | Locate]


@dataclass(slots=True)
class _Store:
    """`reading` is the batch under way, which has the number `batch`: how many tokens and ids of each of its sequences
    are safe after it."""

    is_claimed: bool = False
    keys: set[str] = field(default_factory=set)
    """replicas that it may have besides: of older epochs, or what batches that failed have left"""
    acknowledged: dict[str, int] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    """how many token ids of a sequence it knows"""
    behind: dict[str, Sequence] = field(default_factory=dict)
    reading: dict[str, tuple[Sequence, int, int]] | None = None
    batch: int = 0
    asked: Claim | Replicate | None = None
    """what it has not answered yet, sent at `asked_at_s`"""
    asked_at_s: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)
    """key -> number of the batch that may try it again"""
    over: list[str] = field(default_factory=list)
    """what it has and nobody wants any more"""
    dropping: list[str] = field(default_factory=list)
    """... of which the batch under way tells it"""

    def may_have(self, key: str) -> bool:
        return key in self.keys or key in self.acknowledged or key in (self.reading or ())

    def drops(self, key: str) -> bool:
        """Whether it loses soon what it had of an earlier sequence."""
        return key in self.over or key in self.dropping

    def all_keys(self) -> set[str]:
        return self.keys | self.acknowledged.keys() | (self.reading or {}).keys()


class Replication:
    """One driver's replicas at one epoch; `num_copies` of every sequence. `flush` gives what there is to send."""

    def __init__(self, pipeline: str, epoch: int, block_size: int, num_copies: int = 1, recovery: str = "auto") -> None:
        """`recovery` "replay" never asks for a replica: everything is computed again."""
        self._may_restore = recovery != "replay"
        self._pipeline = pipeline
        self._epoch = epoch
        self._block_size = block_size
        self._num_copies = num_copies
        self._stores: dict[str, _Store] = {}
        self._absent: dict[str, dict[str, bool]] = {}
        """what a store had when it was lost, and whether that has ended since: it may be back with all of it"""
        self._sequences: dict[str, Sequence] = {}
        self._unanswered: set[str] = set()
        self._claims: list[str] = []
        self._num_batches = 0

    # ------------------------------------------------------------ stores

    def store_joined(self, name: str, *, was_there: bool) -> None:
        """A store is there; `was_there` before this epoch began, so that it may still read for an older one."""
        had = self._absent.pop(name, {})
        self._stores[name] = _Store(over=[key for key, has_ended in had.items() if has_ended])
        self._claims.append(name)
        if was_there:
            self._unanswered.add(name)

    def writer_was_there(self, name: str) -> None:
        """A prompt stage that may still write on behalf of an older epoch."""
        self._claims.append(name)
        self._unanswered.add(name)

    def writer_is_back(self, name: str) -> None:
        """There is a new way to a prompt stage: what it was asked before may have gone nowhere."""
        if name in self._unanswered and name not in self._claims:
            self._claims.append(name)

    def claim_again(self) -> None:
        """The writers that have not answered are asked again: they, or we, may not have heard."""
        for name in sorted(self._unanswered - self._stores.keys()):
            self.writer_is_back(name)

    def store_lost(self, name: str) -> list[Sequence]:
        """A store (or a writer) is dead. Returns the sequences that it no longer reads."""
        self._unanswered.discard(name)
        store = self._stores.pop(name, None)
        if store is None:
            return []
        self._absent[name] = dict.fromkeys(store.all_keys(), False) | dict.fromkeys(store.over + store.dropping, True)
        for sequence in self._sequences.values():
            self._note_behind(sequence)  # another store takes its place
        return self._end_reading(store)

    def claimed(self, name: str, keys: Iterable[str]) -> None:
        """Nothing of older epochs is touched by `name`; `keys` are the replicas that it has if it is a store. Whoever
        was asked twice answers twice: by then a batch may be under way, and the store may have more."""
        self._unanswered.discard(name)
        store = self._stores.get(name)
        if store is None or store.is_claimed:
            return
        store.is_claimed, store.asked = True, None
        store.keys = set(keys)
        for sequence in self._sequences.values():
            self._note_behind(sequence)

    def replicated(self, name: str, batch: int, failed: Iterable[str]) -> list[Sequence]:
        """A batch is over. The sequences that are no longer read."""
        store = self._stores.get(name)
        if store is None or store.reading is None or store.batch != batch:  # it was taken for dead meanwhile
            return []
        refused = set(failed)
        for key, (sequence, end, num_ids) in store.reading.items():
            if self._sequences.get(key) is not sequence:
                continue
            if key in refused:
                store.acknowledged.pop(key, None)
                store.keys.add(key)
                store.refused[key] = batch + RETRY_BATCHES
            else:
                store.acknowledged[key], store.ids[key] = end, num_ids
                store.refused.pop(key, None)
            self._note_behind(sequence)
        return self._end_reading(store)

    @property
    def is_settled(self) -> bool:
        """Whether blocks may be given away: nobody touches them on behalf of an older epoch."""
        return not self._unanswered

    @property
    def num_stores(self) -> int:
        """Stores that copies can go to; with none, requests go on unprotected."""
        return sum(store.is_claimed for store in self._stores.values())

    # ------------------------------------------------------------ sequences

    def computed(self, sequence: Sequence) -> None:
        """The KV of the sequence's first `num_computed` tokens is in the pools of all stages."""
        self._sequences[replica_key(sequence.sequence_id)] = sequence
        self._note_behind(sequence)

    def restored(self, sequence: Sequence, name: str) -> None:
        """The sequence's KV came out of this store, so the store has it."""
        if name in self._stores:
            self._stores[name].acknowledged[replica_key(sequence.sequence_id)] = sequence.num_computed
        self.computed(sequence)

    def distrust(self, sequence: Sequence) -> None:
        """What stores have of it may be somebody else's: they are to copy it again, from its beginning."""
        key = replica_key(sequence.sequence_id)
        for store in self._stores.values():
            if store.may_have(key):
                store.keys.add(key)  # whosever it is, it is to be forgotten at the end
            store.acknowledged.pop(key, None)
            store.ids.pop(key, None)
            if store.reading is not None and key in store.reading:
                store.reading[key] = (store.reading[key][0], 0, 0)
        if self._sequences.get(key) is sequence:
            self._note_behind(sequence)

    def ended(self, sequence: Sequence, *, is_superseded: bool) -> None:
        """Nobody wants its tokens any more, unless a sequence with the same key takes its place."""
        key = replica_key(sequence.sequence_id)
        if self._sequences.get(key) is sequence:
            del self._sequences[key]
        for store in self._stores.values():
            may_have = store.may_have(key)
            for of_store in (store.behind, store.refused, store.acknowledged, store.ids):
                of_store.pop(key, None)
            store.keys.discard(key)
            if may_have and is_superseded:
                store.keys.add(key)
            elif may_have:
                store.over.append(key)
        for had in self._absent.values():
            if key in had and not is_superseded:
                had[key] = True

    def protects(self, sequence: Sequence, position: int, max_lag: int, *, is_strict: bool = False) -> bool:
        """Whether the token at `position` may be delivered: a store knows its id and the KV of all tokens before it but
        `max_lag`. True also where no store can (nothing is gained by waiting), unless `is_strict`."""
        key = replica_key(sequence.sequence_id)
        stores = [self._stores[name] for name in self._ranked(key)[: self._num_copies]]
        return any(
            (key in store.refused and not is_strict)
            or (store.acknowledged.get(key, 0) >= position - max_lag and store.ids.get(key, 0) > position)
            for store in stores
        ) or not (stores or is_strict)

    def holder(self, sequence: Sequence, *, is_continued: bool) -> str | None:
        """The store to ask for a replica: one that is known to have it, or, for a sequence that ran elsewhere before
        (`is_continued`), the one that would."""
        if not self._may_restore:
            return None
        key = replica_key(sequence.sequence_id)
        ranked = [name for name in self._ranked(key) if not self._stores[name].drops(key)]
        knowing = [n for n in ranked if key in self._stores[n].keys or self._stores[n].acknowledged.get(key)]
        return next(iter(knowing or (ranked if is_continued else [])), None)

    def lag_tokens(self) -> int:
        """How many computed tokens the least protected sequence would lose."""
        return max((s.num_computed - self._protected(key) for key, s in self._sequences.items()), default=0)

    # ------------------------------------------------------------ sending

    def flush(self, now_s: float = 0.0) -> list[ToStore]:
        """What to send at `now_s`, in order."""
        claim = Claim(self._pipeline, self._epoch, self._num_batches)
        messages: list[ToStore] = [(name, claim) for name in self._claims]
        for name in self._stores.keys() & set(self._claims):
            self._stores[name].asked, self._stores[name].asked_at_s = claim, now_s
        self._claims = []
        for name, store in self._stores.items():
            if store.asked is not None and now_s - store.asked_at_s >= REPEAT_S:
                store.asked_at_s = now_s
                messages.append((name, store.asked))
            if not store.is_claimed:
                continue
            batch = self._next_batch(store)
            if batch is not None:
                store.asked, store.asked_at_s = batch, now_s
                messages.append((name, batch))
        return messages

    def locate(self, store: str, sequence: Sequence) -> ToStore:
        ids = pack_ids(sequence.tokens)
        return store, Locate(self._pipeline, self._epoch, sequence.sequence_id, sequence.attempt, ids, sequence.placed)

    def _next_batch(self, store: _Store) -> Replicate | None:
        is_due = bool(store.over) or any(self._is_due(store, *each) for each in store.behind.items())
        if store.reading is not None or not is_due:
            return None
        items, reading = self._take_behind(store)
        self._num_batches += 1
        if not (items or store.over):
            return None
        store.reading, store.batch = reading, self._num_batches
        store.over, store.dropping = [], store.over
        return Replicate(self._pipeline, self._epoch, self._num_batches, items, store.dropping)

    def _take_behind(self, store: _Store) -> tuple[list[ReplicaItem], dict[str, tuple[Sequence, int, int]]]:
        """What the next batch is to copy, and how much of each sequence is safe after it."""
        items: list[ReplicaItem] = []
        reading: dict[str, tuple[Sequence, int, int]] = {}
        room = MAX_BATCH_TOKENS
        for key, sequence in self._waiting(store):
            if sequence.is_leaving or not sequence.blocks:
                del store.behind[key]
                continue
            if store.refused.get(key, 0) > self._num_batches:
                continue
            start = min(store.acknowledged.get(key, 0), sequence.num_computed)
            count = min(sequence.num_computed - start, room)
            if room == 0:
                break
            del store.behind[key]
            if count == 0:
                continue
            items.append(self._item(key, sequence, start, count))
            reading[key] = (sequence, start + count, len(sequence.tokens))
            sequence.num_reads += 1
            room -= count
        return items, reading

    def _waiting(self, store: _Store) -> list[tuple[str, Sequence]]:
        """Streams that decode before whole prompts, which would hold them up for little."""

        def has_much(waiting: tuple[str, Sequence]) -> bool:
            key, sequence = waiting
            return sequence.num_computed - store.acknowledged.get(key, 0) > FEW_TOKENS

        return sorted(store.behind.items(), key=has_much)

    def _is_due(self, store: _Store, key: str, sequence: Sequence) -> bool:
        """Two tokens at once cost little more than one; who holds tokens back for the store does not wait."""
        return bool(sequence.undelivered) or sequence.num_computed - store.acknowledged.get(key, 0) >= MIN_NEWS_TOKENS

    def _item(self, key: str, sequence: Sequence, start: int, count: int) -> ReplicaItem:
        first, end = start // self._block_size, -(-(start + count) // self._block_size)
        ids = pack_ids(sequence.tokens[start:])
        return ReplicaItem(key, start, count, sequence.blocks[first:end], ids, sequence.placed)

    # ------------------------------------------------------------ inside

    def _note_behind(self, sequence: Sequence) -> None:
        key = replica_key(sequence.sequence_id)
        for name in self._ranked(key)[: self._num_copies]:
            store = self._stores[name]
            if store.acknowledged.get(key, 0) < sequence.num_computed:
                store.behind[key] = sequence

    def _end_reading(self, store: _Store) -> list[Sequence]:
        sequences = [] if store.reading is None else [sequence for sequence, *_ in store.reading.values()]
        store.reading = store.asked = None
        store.dropping = []
        for sequence in sequences:
            sequence.num_reads -= 1
        return sequences

    def _protected(self, key: str) -> int:
        return max((store.acknowledged.get(key, 0) for store in self._stores.values()), default=0)

    def _ranked(self, key: str) -> list[str]:
        """Stores in this key's order of preference (rendezvous hashing): a store that comes or goes moves only the
        replicas that are its own."""
        names = [name for name, store in self._stores.items() if store.is_claimed]
        return names if len(names) < 2 else sorted(names, key=lambda name: _weight(name, key))


@functools.lru_cache(1 << 16)
def _weight(name: str, key: str) -> bytes:
    return hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=8).digest()
