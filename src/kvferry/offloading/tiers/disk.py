"""The disk tier, type "fs": one content-addressed file per chunk in a folder that one process uses at a time.

The owner's thread keeps the books (`DiskIndex`); the tier's threads touch the disk, and what they did enters the books
when the owner polls. So the books need no lock, and no call of the owner waits for the disk. The quota holds at every
moment: room is found and accounted for when a store is submitted, and the files that make room are deleted by the same
action, before it writes. A chunk is acknowledged after its rename: should the process die, the next one finds the file.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from kvferry.clock import Clock, SystemClock
from kvferry.config import parse_settings
from kvferry.errors import ConfigError, TierBusy, TierCorrupt, TierError, TierUnavailable
from kvferry.kv.keys import digest as digest_of
from kvferry.kv.space import folder_of, space_at
from kvferry.offloading.store.tier import ResetReceipt, TierJob, TierResult, TierRoom, TierStats
from kvferry.offloading.tiers.disk_files import ChunkFolder, FoundChunk, OnStep, chunk_name, why_unusable
from kvferry.offloading.tiers.disk_format import HEADER_BYTES, UnknownFormat
from kvferry.offloading.tiers.disk_index import FOLDER_BYTES, OWN, DiskIndex, Entry, Room, Victim, chunk_cost_bytes
from kvferry.offloading.tiers.disk_journal import Journal, Note, Use, read_order
from kvferry.offloading.tiers.io_threads import Done, IoThreads, Urgency
from kvferry.types import Namespace, StoreKey

logger = logging.getLogger(__name__)

MAX_QUEUED_STORES = 512
MAX_QUARANTINED = 16
PAUSE_S = 5.0  # no stores for so long after the disk refused one; twice as long each time it refuses again
MAX_PAUSE_S = 60.0
CLOSE_S = 5.0
_NOTES_PER_BATCH = 64
_MAX_NOTES = 1 << 16
_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSALS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOENT, errno.EMFILE}
    | {errno.ENOTDIR, errno.ELOOP, errno.ESTALE, errno.ENODEV, errno.ENOTCONN}
)


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """Settings of a tier `{"type": "fs", ...}`."""

    path: str
    """Folder of the chunks, made where missing."""
    max_bytes: int | None = None
    """Largest size, in bytes, of all files in the folder, of all namespaces; None: as much as the disk gives."""
    num_threads: int = field(default=2, metadata={"minimum": 1, "maximum": 256})
    """Number of threads that read and write."""
    fsync: bool = False
    """True: chunks survive a power loss too (several ms for each chunk). False: chunks survive the process only."""
    name: str = "fs"
    """Name of the tier in metrics and logs; unique in one store."""


@dataclass(slots=True)
class _Store:
    job: TierJob
    room: Room
    is_removed: bool = False  # `remove` came while it was under way
    is_second_try: bool = False  # the disk was full; chunks that were used least recently make room


@dataclass(slots=True)
class _LoadOrder:
    job: TierJob
    entry: Entry
    quarantined: str | None = None


@dataclass(slots=True)
class _Chore:
    """Delete these, and write the notes."""

    victims: list[Victim]
    is_new_folder: bool = False


@dataclass(slots=True)
class _Probe:
    """See whether a tier that is down can be written to again, so many bytes."""

    num_bytes: int


_Work = _Store | _LoadOrder | _Chore | _Probe


def _check_quota(name: str, max_bytes: int | None, payload_bytes: int) -> None:
    needed_bytes = FOLDER_BYTES + chunk_cost_bytes(HEADER_BYTES + payload_bytes)
    if max_bytes is not None and max_bytes < needed_bytes:
        raise ConfigError(
            f"{name}: max_bytes {max_bytes} is smaller than one chunk with its header and books "
            f"({needed_bytes} bytes); raise max_bytes, or lower the chunk size"
        )


class DiskTier:
    """See the module docstring, and `kvferry.offloading.store.tier` for the contract."""

    def __init__(
        self,
        path: Path,
        namespace: Namespace,
        *,
        max_bytes: int | None = None,
        num_threads: int = 2,
        fsync: bool = False,
        name: str = "fs",
        clock: Clock | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        """Open (or make) the folder, lock it, and read which chunks there are (about 6 us a file).

        More than `max_bytes` of them (the quota was lowered): the least recently used are deleted. `on_step(name)` is
        called by the tier's threads amid their work ("chunk-write", "chunk-rename", "chunk-written", "index-write",
        "index-rewrite"): for tests that end the process there. ConfigError when the folder cannot be used, is held by
        another process (its pid is named) or has another format, or when `max_bytes` is too small for any chunk.
        """
        self.name = name
        self._index = DiskIndex(max_bytes)
        self.check_fits(payload_bytes=1)
        if num_threads < 1:
            raise ConfigError(f"{name}: num_threads must be at least 1, not {num_threads}")
        self._clock = clock if clock is not None else SystemClock()
        self._namespaces = [namespace.digest]  # by number
        self._writing: dict[Entry, _Store] = {}
        self._loading: Counter[Entry] = Counter()
        self._notes: deque[Note] = deque(maxlen=_MAX_NOTES)  # filled here, emptied by the tier's threads
        self._is_noting = False
        self._paused_until_s = float("-inf")
        self._pause_s = PAUSE_S
        self._is_up = True
        self._is_probing = False
        self._refused_bytes = 0
        self._num_losses = 0  # of the folder, as the books know
        self._is_closed = False
        self._counts: Counter[str] = Counter()
        self._lost: list[tuple[StoreKey, str]] = []
        self._folder = ChunkFolder(path, namespace, fsync=fsync, on_step=on_step)
        try:
            self._read_index()
            self._journal = Journal(str(path / "journal"), map(self._chunk_id, self._index.entries), on_step)
        except BaseException as error:
            self._folder.close()
            if isinstance(error, OSError):
                raise ConfigError(f"cannot use {path} as a store: {error}") from error
            raise
        self._threads: IoThreads[_Work] = IoThreads(f"kvferry-{name}", num_threads, self._do)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], namespace: Namespace, clock: Clock, where: str) -> DiskTier:
        """As `DiskSettings` says."""
        settings = parse_settings(DiskSettings, config, where)
        folder = folder_of(settings.path, f"{where}.path")
        try:
            return cls(
                folder,
                namespace,
                max_bytes=settings.max_bytes,
                num_threads=settings.num_threads,
                fsync=settings.fsync,
                name=settings.name,
                clock=clock,
            )
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    # -- asking ----------------------------------------------------------------------------------------------------

    def contains(self, keys: Sequence[StoreKey]) -> list[bool]:
        """Whether the books have it."""
        entries = self._index.entries
        return [OWN + key in entries and not self._is_closed for key in keys]

    def keys(self) -> list[StoreKey]:
        """The own namespace's."""
        return [] if self._is_closed else [StoreKey(entry[len(OWN) :]) for entry in self._own_entries()]

    @classmethod
    def room(cls, config: Mapping[str, Any], payload_bytes: int, where: str) -> TierRoom:
        """The chunks that quota and disk give room for. ConfigError for wrong settings; opens and makes nothing."""
        settings = parse_settings(DiskSettings, config, where)
        _check_quota(settings.name, settings.max_bytes, payload_bytes)
        folder = folder_of(settings.path, f"{where}.path")
        space = space_at(folder)
        limit_bytes, reason = settings.max_bytes, f"max_bytes {settings.max_bytes}"
        if limit_bytes is None:
            limit_bytes, reason = space.free_bytes, f"no max_bytes: the {space.free_bytes} bytes that are free"
        num_chunks = max(0, limit_bytes - FOLDER_BYTES) // chunk_cost_bytes(HEADER_BYTES + payload_bytes)
        problem = None
        if not space.is_writable:
            problem = f"{where}.path={settings.path!r} is no writable folder: give one, or correct its permissions"
        elif limit_bytes > space.total_bytes:
            problem = f"{where}.max_bytes={limit_bytes} is more than the whole disk ({space.total_bytes}): lower it"
        else:
            problem = why_unusable(folder)
        return TierRoom(settings.name, num_chunks, f"{reason}, {payload_bytes} bytes a chunk", problem, folder)

    def check_fits(self, payload_bytes: int) -> None:
        """ConfigError when the quota is smaller than one such chunk."""
        _check_quota(self.name, self._index.limit_bytes, payload_bytes)

    def take_lost(self) -> list[tuple[StoreKey, str]]:
        """Evicted, corrupt, of another format, or without their file."""
        lost, self._lost = self._lost, []
        return lost

    def _note_lost(self, entry: Entry, reason: str) -> None:
        if entry.startswith(OWN):
            self._lost.append((StoreKey(entry[len(OWN) :]), reason))

    def stats(self) -> TierStats:
        """A snapshot."""
        return TierStats(
            num_chunks=self._index.num_own,
            used_bytes=self._index.used_bytes,
            max_bytes=self._index.limit_bytes,
            num_queued=len(self._writing) + self._loading.total(),
            num_evicted=self._counts["evicted"],
            num_corrupt=self._counts["corrupt"],
            num_unknown_format=self._counts["unknown_format"],
            is_up=self._is_up,
            details={
                "num_chunks_all_namespaces": len(self._index.entries),
                "num_quarantined": len(self._index.quarantine),
                "num_pauses": self._counts["pauses"],
            },
        )

    def check_integrity(self) -> None:
        """AssertionError when the books do not add up."""
        self._index.check_integrity()
        assert all(count > 0 for count in self._loading.values())
        assert not self._writing.keys() & self._index.entries.keys()

    # -- jobs ------------------------------------------------------------------------------------------------------

    def submit_store(self, job: TierJob) -> None:
        """TierBusy: queue full, the disk refused a store some seconds ago, the key is in use, or everything that could
        make room is."""
        entry = OWN + job.key
        self._check_open()
        if entry in self._index.unknown:
            raise TierUnavailable(f"chunk {job.key.hex()}: a file that kvferry must not replace is in its place")
        if entry in self._writing or entry in self._loading or self._index.is_leaving(entry):
            raise TierBusy(f"chunk {job.key.hex()} is being written, read or deleted")
        if self._threads.num_queued(Urgency.STORE) >= MAX_QUEUED_STORES:
            raise TierBusy(f"{MAX_QUEUED_STORES} chunks wait to be written")
        if self._clock.now() < self._paused_until_s:
            raise TierBusy("paused: the disk refused a chunk a moment ago")
        cost_bytes = chunk_cost_bytes(HEADER_BYTES + len(job.buffer))
        room = self._index.make_room(entry, cost_bytes, lambda other: other not in self._loading)
        if room is None:
            raise TierBusy("all chunks that could make room are in use")
        self._note_victims(room)
        work = _Store(job, room)
        self._writing[entry] = work
        self._threads.submit(Urgency.STORE, work)

    def _note_victims(self, room: Room) -> None:
        for victim in room.victims:
            if victim.entry is not None:
                self._counts["evicted"] += victim.entry != room.entry
                self._note_lost(victim.entry, "evicted" if victim.entry != room.entry else "being written anew")
                self._notes.append((Use.GONE, self._chunk_id(victim.entry)))

    def submit_load(self, job: TierJob) -> None:
        """TierUnavailable when there is no such chunk."""
        entry = OWN + job.key
        self._check_open()
        if entry not in self._index.entries:
            raise TierUnavailable(f"chunk {job.key.hex()} is not on the disk")
        self._loading[entry] += 1
        self._threads.submit(Urgency.LOAD, _LoadOrder(job, entry))

    def poll(self) -> list[TierResult]:
        """Enter what the threads did into the books; see now and then whether a tier that is down is back."""
        results = []
        all_done = self._threads.take_done()
        self._forget_lost_folder()
        for done in all_done:
            if isinstance(done.work, _Probe):
                self._is_probing = False
                self._note_health(done.error)
            elif isinstance(done.work, _Store):
                if not self._try_again(done.work, done.error):
                    results.append(self._finish_store(done.work, done))
            elif isinstance(done.work, _LoadOrder):
                results.append(self._finish_load(done.work, done))
            else:
                self._is_noting = False
                for victim in done.work.victims:
                    self._index.end_removal(victim)
        if len(self._index.quarantine) > MAX_QUARANTINED:
            self._delete([self._index.begin_quarantine_removal()])
        if not (self._is_up or self._is_probing or self._is_closed) and self._clock.now() >= self._paused_until_s:
            self._is_probing = True
            self._threads.submit(Urgency.CHORE, _Probe(self._refused_bytes))
        return results

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """Order of use; reaches the disk in batches."""
        for key in keys:
            if self._index.touch(OWN + key):
                self._notes.append((Use.USED, self._chunk_id(OWN + key)))
        if len(self._notes) >= _NOTES_PER_BATCH and not self._is_noting:
            self._is_noting = True
            self._delete([])

    def remove(self, keys: Sequence[StoreKey]) -> None:
        """Misses at once; the files go in the background."""
        victims = []
        for entry in (OWN + key for key in keys):
            if entry in self._writing:
                self._writing[entry].is_removed = True
            elif entry in self._index.entries:
                victims.append(self._index.begin_removal(entry))
                self._notes.append((Use.GONE, self._chunk_id(entry)))
        if victims:
            self._delete(victims)

    def clear(self) -> ResetReceipt:
        """Other namespaces in the folder stay."""
        own = self._own_entries()
        used_bytes = sum(self._index.entries[entry] for entry in own)
        writing = [entry for entry in self._writing if entry not in self._index.entries]
        self.remove([StoreKey(entry[len(OWN) :]) for entry in (*own, *writing)])
        return ResetReceipt(self.name, len(own), used_bytes)

    def drain(self, timeout_s: float) -> bool:
        """Wait for the threads."""
        return self._threads.drain(timeout_s)

    def close(self) -> None:
        """Ends what is queued, waits up to 5 s for what runs. A thread that is stuck in the disk keeps the folder
        locked until the process ends: nobody else may write while it could."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._threads.close(CLOSE_S):
            self._write_notes([])
            self._journal.close()
            self._folder.close()
        else:
            logger.error("tier %s: the disk does not answer; %s stays locked", self.name, self._folder.path)

    # -- on the tier's threads -------------------------------------------------------------------------------------

    def _do(self, work: _Work) -> None:
        match work:
            case _Store():
                self._store(work)
            case _LoadOrder():
                self._load(work)
            case _Chore():
                self._do_chore(work)
            case _Probe():
                self._folder.probe(work.num_bytes)

    def _store(self, work: _Store) -> None:
        job = work.job
        if job.digest is None or digest_of(job.buffer) != job.digest:
            raise TierCorrupt(f"chunk {job.key.hex()}: its bytes in host memory do not match their digest")
        for victim in work.room.victims:
            self._unlink(victim)
        self._folder.write(job.key, job.buffer, job.digest)
        self._write_notes([(Use.USED, self._chunk_id(work.room.entry))])

    def _load(self, work: _LoadOrder) -> None:
        try:
            work.job.digest = self._folder.read(work.job.key, work.job.buffer)
        except TierCorrupt:
            with suppress(OSError):
                work.quarantined = self._folder.quarantine(work.job.key)
            raise

    def _do_chore(self, work: _Chore) -> None:
        for victim in work.victims:
            try:
                self._unlink(victim)
            except OSError as error:
                logger.warning("tier %s: cannot delete a file: %s", self.name, error)
        if work.is_new_folder:
            self._journal.begin_anew()
        self._write_notes([])

    def _unlink(self, victim: Victim) -> None:
        self._folder.unlink(victim.name or self._file_name_of(victim))
        victim.is_deleted = True

    def _write_notes(self, more: list[Note]) -> None:
        notes = []
        with suppress(IndexError):
            while True:
                notes.append(self._notes.popleft())
        self._journal.append(notes + more)

    # -- back in the owner's thread --------------------------------------------------------------------------------

    def _finish_store(self, work: _Store, done: Done[_Work]) -> TierResult:
        del self._writing[work.room.entry]
        self._index.settle(work.room, is_written=done.error is None)
        for victim in work.room.victims:
            if victim.entry is not None and not victim.is_deleted:  # it is back
                self._note_lost(victim.entry, "evicted")
        error = done.error
        self._refused_bytes = len(work.job.buffer)
        self._note_health(error)
        if error is None and work.is_removed:
            self.remove((work.job.key,))
            error = TierUnavailable(f"chunk {work.job.key.hex()} was removed while it was written")
        return _result(work.job, error, done.seconds)

    def _try_again(self, work: _Store, error: Exception | None) -> bool:
        """On a full disk the chunks that were used least recently make room, and the chunk is written once more."""
        if not (isinstance(error, OSError) and error.errno in _IS_FULL) or work.is_second_try or self._is_closed:
            return False
        entry = work.room.entry
        cost_bytes = work.room.cost_bytes
        entries = self._index.entries.items()
        if work.is_removed or sum(cost for other, cost in entries if other not in self._loading) < cost_bytes:
            return False
        self._index.settle(work.room, is_written=False)
        for victim in work.room.victims:
            if victim.entry is not None and not victim.is_deleted:
                self._note_lost(victim.entry, "evicted")
        room = self._index.make_room(entry, cost_bytes, lambda other: other not in self._loading, cost_bytes)
        assert room is not None, "what may go is enough"
        self._note_victims(room)
        work.room, work.is_second_try = room, True
        self._threads.submit(Urgency.STORE, work)
        return True

    def _note_health(self, error: Exception | None) -> None:
        """A write, or the probe of one, ended so: the tier is up or down now; one line in the log when that changes."""
        if error is None:
            if not self._is_up:
                logger.warning("tier %s is back: %s can be written to again", self.name, self._folder.path)
            self._is_up, self._pause_s, self._paused_until_s = True, PAUSE_S, float("-inf")
            return
        is_refused = isinstance(error, OSError) and error.errno in _REFUSALS
        if self._is_closed or not (is_refused or isinstance(error, TierUnavailable)):
            return
        if self._is_up:
            logger.warning(
                "tier %s is down, %s cannot be written to: %s; the next try is in %.0f s, later ones less often",
                self.name, self._folder.path, error, self._pause_s,
            )  # fmt: skip
            self._is_up = False
        if self._clock.now() < self._paused_until_s:
            return  # it was under way when another one was refused
        self._paused_until_s = self._clock.now() + self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        self._counts["pauses"] += 1

    def _forget_lost_folder(self) -> None:
        """The folder was gone and is made anew: nothing that the books say of its files is true any more."""
        if self._num_losses == self._folder.num_losses:
            return
        self._num_losses = self._folder.num_losses
        for entry in self._index.forget_files():
            self._note_lost(entry, "its file is gone")
        self._threads.submit(Urgency.CHORE, _Chore([], is_new_folder=True))
        logger.warning(
            "tier %s: the folder %s was missing with all its chunks; kvferry created the folder again",
            self.name,
            self._folder.path,
        )

    def _finish_load(self, work: _LoadOrder, done: Done[_Work]) -> TierResult:
        entry = work.entry
        self._loading[entry] -= 1
        if not self._loading[entry]:
            del self._loading[entry]
        if isinstance(done.error, TierCorrupt):
            self._counts["corrupt"] += 1
            self._note_lost(entry, "corrupt")
            if work.quarantined is None:
                self.remove((work.job.key,))
            else:
                self._index.discard(entry)
                self._index.add_quarantined(work.quarantined, chunk_cost_bytes(HEADER_BYTES + len(work.job.buffer)))
        elif isinstance(done.error, UnknownFormat):
            self._counts["unknown_format"] += 1
            self._note_lost(entry, "of an unknown format")
            self._index.set_unknown(entry)
        elif isinstance(done.error, FileNotFoundError):
            self._note_lost(entry, "its file is gone")
            self._index.discard(entry)
        return _result(work.job, done.error, done.seconds)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _read_index(self) -> None:
        for refused in self._folder.scan_quarantine():
            self._index.add_quarantined(refused.name, chunk_cost_bytes(refused.file_bytes))
        numbers = {digest: number for number, digest in enumerate(self._namespaces)}
        found: dict[int, tuple[FoundChunk, Entry]] = {}
        for chunk in self._folder.scan():
            if chunk.namespace not in numbers:
                numbers[chunk.namespace] = len(self._namespaces)
                self._namespaces.append(chunk.namespace)
            entry = numbers[chunk.namespace].to_bytes(2, "little") + chunk.key
            found[self._chunk_id(entry)] = (chunk, entry)
        rank = {chunk_id: number for number, chunk_id in enumerate(read_order(str(self._folder.path / "journal")))}
        # Those the journal does not know came after its last record: the newest.
        for chunk_id in sorted(found, key=lambda i: (rank.get(i, len(rank)), found[i][0].written_ns)):
            chunk, entry = found[chunk_id]
            self._index.add(entry, chunk_cost_bytes(chunk.file_bytes))
        self._delete_excess()

    def _delete_excess(self) -> None:
        room = self._index.make_room(b"", 0, lambda _: True)
        assert room is not None, "an empty folder fits the quota"
        for victim in room.victims:
            self._unlink(victim)
        self._index.settle(room, is_written=False)
        while len(self._index.quarantine) > MAX_QUARANTINED:
            victim = self._index.begin_quarantine_removal()
            self._unlink(victim)
            self._index.end_removal(victim)

    def _own_entries(self) -> list[Entry]:
        return [entry for entry in self._index.entries if entry.startswith(OWN)]

    def _delete(self, victims: list[Victim]) -> None:
        self._threads.submit(Urgency.CHORE, _Chore(victims))

    def _check_open(self) -> None:
        if self._is_closed:
            raise TierUnavailable("the tier is closed")

    def _file_name_of(self, victim: Victim) -> str:
        assert victim.entry is not None
        return chunk_name(self._namespaces[int.from_bytes(victim.entry[:2], "little")], victim.entry[2:])

    def _chunk_id(self, entry: Entry) -> int:
        """The journal's name for it: 64 bits of a hash. Two chunks with one id share their place in the order."""
        return xxhash.xxh3_64_intdigest(self._namespaces[int.from_bytes(entry[:2], "little")].encode() + entry[2:])


def _result(job: TierJob, error: Exception | None, seconds: float) -> TierResult:
    if error is None:
        return TierResult(job.job_id, job.key, True, job.digest, None, len(job.buffer), seconds)
    if not isinstance(error, TierError):
        cause, error = error, TierUnavailable(f"chunk {job.key.hex()}: {error}")
        error.__cause__ = cause
    return TierResult(job.job_id, job.key, False, None, error, 0, seconds)
