"""The disk tier's books: which chunks there are, their order of use, and what counts against the quota."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvferry.offloading.store.policy import LRUPolicy
from kvferry.offloading.tiers.disk_journal import RECORD_BYTES, SMALLEST_LIMIT_BYTES

Entry = bytes
"""Number of the namespace (u16 LE, 0 is the own one) + key."""
OWN = b"\0\0"
"""The number of the own namespace."""

# The journal and its rewrite: at most 5 records a chunk (disk_journal), and what is there without any chunk.
_JOURNAL_BYTES_PER_CHUNK = 5 * RECORD_BYTES
FOLDER_BYTES = 2 * SMALLEST_LIMIT_BYTES


def chunk_cost_bytes(file_bytes: int) -> int:
    """What a chunk file of that size counts against the quota: whole pages, and its share of the journal."""
    return -(-file_bytes // 4096) * 4096 + _JOURNAL_BYTES_PER_CHUNK


@dataclass(slots=True)
class Victim:
    """A file to delete, from the decision to the deed."""

    entry: Entry | None  # None for a file in quarantine
    name: str  # relative to the folder; empty: the name of the entry
    cost_bytes: int
    is_deleted: bool = False


@dataclass(slots=True)
class Room:
    """Room made for one chunk. Holds the larger one of what goes and what comes, until it is settled."""

    entry: Entry
    cost_bytes: int
    victims: list[Victim]
    held_bytes: int


class DiskIndex:
    """Index and quota of one folder. Owner's thread only; does no I/O.

        used_bytes = folder + entries + unknown + quarantine + leaving + room held      <= limit

    What is being deleted stays on the account until the deletion is confirmed.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = FOLDER_BYTES
        self.entries: dict[Entry, int] = {}  # what can be loaded -> cost
        self.num_own = 0  # entries of the own namespace
        self.unknown: dict[Entry, int] = {}  # of another format version: neither loaded, nor evicted, nor replaced
        self.quarantine: deque[Victim] = deque()  # oldest first
        self._order: LRUPolicy[Entry] = LRUPolicy()  # of the entries
        self._leaving: set[Entry] = set()  # being deleted, alone or to make room
        self._removals: int = 0  # cost of those that are deleted alone
        self._rooms: dict[Entry, Room] = {}

    def add(self, entry: Entry, cost_bytes: int) -> None:
        """A chunk that is on the disk, as the most recently used."""
        self.entries[entry] = cost_bytes
        self._order.insert(entry)
        self.num_own += entry.startswith(OWN)
        self.used_bytes += cost_bytes

    def discard(self, entry: Entry) -> int:
        """A chunk whose file is no longer there under its name; returns the cost given back."""
        if entry not in self.entries:
            return 0
        cost_bytes = self._take(entry)
        self.used_bytes -= cost_bytes
        return cost_bytes

    def forget_files(self) -> list[Entry]:
        """The folder is empty: no entry is left, nor anything set aside. What is under way is settled as usual."""
        gone = list(self.entries)
        for entry in gone:
            self.discard(entry)
        self.used_bytes -= sum(self.unknown.values()) + sum(refused.cost_bytes for refused in self.quarantine)
        self.unknown.clear()
        self.quarantine.clear()
        return gone

    def touch(self, entry: Entry) -> bool:
        """It was used; False when there is no such entry."""
        self._order.touch(entry)
        return entry in self.entries

    def is_leaving(self, entry: Entry) -> bool:
        """Its file is being deleted: nothing may be written under that name before that is over."""
        return entry in self._leaving

    def set_unknown(self, entry: Entry) -> None:
        """Its file is whole but of another format version."""
        if entry in self.entries:
            self.unknown[entry] = self._take(entry)

    def add_quarantined(self, name: str, cost_bytes: int) -> None:
        """A refused file that was set aside."""
        self.quarantine.append(Victim(None, name, cost_bytes))
        self.used_bytes += cost_bytes

    def begin_removal(self, entry: Entry) -> Victim:
        """The entry is a miss from now on; `end_removal` when its file is deleted, or could not be."""
        cost_bytes = self._take(entry)
        self._leaving.add(entry)
        self._removals += cost_bytes
        return Victim(entry, "", cost_bytes)

    def begin_quarantine_removal(self) -> Victim:
        """The same for the oldest file in quarantine."""
        victim = self.quarantine.popleft()
        self._removals += victim.cost_bytes
        return victim

    def end_removal(self, victim: Victim) -> None:
        """The file is gone; one that could not be deleted is not loaded any more, but counts."""
        self._removals -= victim.cost_bytes
        self.used_bytes -= victim.cost_bytes
        if victim.entry is not None:
            self._leaving.discard(victim.entry)
        if victim.is_deleted:
            return
        self.used_bytes += victim.cost_bytes
        if victim.entry is None:
            self.quarantine.append(victim)
        else:
            self.unknown[victim.entry] = victim.cost_bytes

    def make_room(
        self, entry: Entry, cost_bytes: int, is_evictable: Callable[[Entry], bool], at_least_bytes: int = 0
    ) -> Room | None:
        """Take the victims it needs out of the index: the chunk's own older file, quarantine, then by order of use.

        The victims are to be deleted before anything is written; then `settle`. `at_least_bytes` of them go, whatever
        the quota says (the disk is full). None (and no change): not enough.
        """
        over_bytes = 0 if self.limit_bytes is None else self.used_bytes + cost_bytes - self.limit_bytes
        needed_bytes = max(over_bytes, at_least_bytes)
        evicted: list[Entry] = []
        num_quarantined = freed_bytes = 0
        if entry in self.entries:
            evicted.append(entry)
            freed_bytes += self.entries[entry]
        for refused in self.quarantine:
            if freed_bytes >= needed_bytes:
                break
            freed_bytes += refused.cost_bytes
            num_quarantined += 1
        if freed_bytes < needed_bytes:
            for victim in self._order.victims(lambda other: other != entry and is_evictable(other)):
                evicted.append(victim)
                freed_bytes += self.entries[victim]
                if freed_bytes >= needed_bytes:
                    break
        if freed_bytes < needed_bytes:
            return None
        victims = [Victim(gone, "", self._take(gone)) for gone in evicted]
        self._leaving.update(evicted)
        victims.extend(self.quarantine.popleft() for _ in range(num_quarantined))
        room = Room(entry, cost_bytes, victims, max(cost_bytes, freed_bytes))
        self._rooms[entry] = room
        self.used_bytes += room.held_bytes - freed_bytes
        return room

    def settle(self, room: Room, *, is_written: bool) -> None:
        """The writing is over, one way or the other; victims that are still on the disk come back."""
        del self._rooms[room.entry]
        self.used_bytes -= room.held_bytes
        for victim in room.victims:
            if victim.entry is not None:
                self._leaving.discard(victim.entry)
            if victim.is_deleted:
                continue
            if victim.entry is None:
                self.quarantine.append(victim)
                self.used_bytes += victim.cost_bytes
            else:
                self.add(victim.entry, victim.cost_bytes)
        if is_written:
            self.add(room.entry, room.cost_bytes)

    def check_integrity(self) -> None:
        """AssertionError when the books do not add up."""
        assert len(self._order) == len(self.entries)
        assert self.num_own == sum(entry.startswith(OWN) for entry in self.entries)
        assert all(entry in self._order for entry in self.entries)
        assert not self.entries.keys() & (self._leaving | self.unknown.keys() | self._rooms.keys())
        kept_bytes = sum(self.entries.values()) + sum(self.unknown.values())
        moving_bytes = self._removals + sum(room.held_bytes for room in self._rooms.values())
        quarantine_bytes = sum(refused.cost_bytes for refused in self.quarantine)
        assert self.used_bytes == FOLDER_BYTES + kept_bytes + moving_bytes + quarantine_bytes, "bytes are lost"
        assert self.limit_bytes is None or self.used_bytes <= self.limit_bytes, "over the quota"

    def _take(self, entry: Entry) -> int:
        self._order.remove(entry)
        self.num_own -= entry.startswith(OWN)
        return self.entries.pop(entry)
