"""A tier for kvferry, type "sqlite": chunks of KV are rows of one SQLite file, which one process uses at a time.

The owner's thread keeps the books: which chunks there are, in the order of their use, and how many bytes they take.
One thread of the tier talks to SQLite, and what it did enters the books when the owner polls. So the books need no
lock, and no call of the owner waits for SQLite. Each store is one transaction, which also deletes what made room.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvferry.clock import Clock
from kvferry.config import parse_settings
from kvferry.errors import ConfigError, TierBusy, TierCorrupt, TierError, TierUnavailable
from kvferry.kv.keys import digest as digest_of
from kvferry.kv.space import folder_of, space_at
from kvferry.offloading.store.tier import ResetReceipt, TierJob, TierResult, TierRoom, TierStats
from kvferry.offloading.tiers.io_threads import Done, IoThreads, Urgency
from kvferry.types import Namespace, StoreKey

logger = logging.getLogger(__name__)

MAX_QUEUED = 256
CLOSE_S = 5.0
LARGEST_BYTES = 900_000_000  # SQLite's own limit of one value is 10^9
Row = tuple[str, bytes]
"""Namespace and key of a chunk."""


@dataclass(frozen=True, slots=True)
class SqliteSettings:
    """`{"type": "sqlite", ...}`"""

    path: str  # the file; made if missing, with its folder
    max_bytes: int | None = field(
        default=None, metadata={"minimum": 1}
    )  # of all chunks; SQLite's own pages come on top
    name: str = "sqlite"


@dataclass(slots=True)
class Work:
    """For the tier's thread: a store, a load, or (without a job) rows to be deleted."""

    job: TierJob | None
    delete: list[Row]
    used: list[Row]  # were touched since the last store
    is_load: bool = False
    is_removed: bool = False  # `remove` came while it was being stored


class SqliteTier:
    """See the module's text, and `kvferry.offloading.store.tier` for what each method promises."""

    def __init__(self, path: Path, namespace: Namespace, *, max_bytes: int | None = None, name: str = "sqlite") -> None:
        """Open or make the file, and read which chunks there are. ConfigError when it cannot be used."""
        self.name = name
        self._namespace = namespace.digest
        self._max_bytes = max_bytes
        self._db = _open(path)
        rows = self._db.execute("SELECT namespace, key, length(payload) FROM chunks ORDER BY used")
        self._books: OrderedDict[Row, int] = OrderedDict(((space, key), size) for space, key, size in rows)
        self._used_bytes = sum(self._books.values())
        self._writing: dict[Row, Work] = {}
        self._loading: Counter[Row] = Counter()
        self._leaving: Counter[Row] = Counter()  # to be deleted by the thread
        self._touched: dict[Row, None] = {}
        self._lost: list[tuple[StoreKey, str]] = []
        self._num_evicted = self._num_corrupt = 0
        self._is_up = True
        self._is_closed = False
        self._threads: IoThreads[Work] = IoThreads(f"kvferry-{name}", 1, self._do)
        if max_bytes is not None and (excess := self._make_room(0)):  # the quota was lowered
            self._delete(excess)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], namespace: Namespace, clock: Clock, where: str) -> SqliteTier:
        """As `SqliteSettings` says."""
        settings = parse_settings(SqliteSettings, config, where)
        path = folder_of(settings.path, f"{where}.path")
        try:
            return cls(path, namespace, max_bytes=settings.max_bytes, name=settings.name)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    @classmethod
    def room(cls, config: Mapping[str, Any], payload_bytes: int, where: str) -> TierRoom:
        """For `kvferry doctor`; opens nothing."""
        settings = parse_settings(SqliteSettings, config, where)
        space = space_at(folder_of(settings.path, f"{where}.path").parent)
        limit_bytes, reason = settings.max_bytes, f"max_bytes {settings.max_bytes}"
        if limit_bytes is None:
            limit_bytes, reason = space.free_bytes, f"no max_bytes: the {space.free_bytes} bytes that are free"
        problem = None
        if not space.is_writable:
            problem = f"{where}.path={settings.path!r} lies in no writable folder: give another"
        return TierRoom(
            settings.name, limit_bytes // payload_bytes, f"{reason}, {payload_bytes} bytes a chunk", problem
        )

    # ---- asking ---------------------------------------------------------------------------------------------------

    def contains(self, keys: Sequence[StoreKey]) -> list[bool]:
        """What the books say."""
        return [(self._namespace, key) in self._books and not self._is_closed for key in keys]

    def keys(self) -> list[StoreKey]:
        """Those of the own namespace."""
        return [] if self._is_closed else [StoreKey(key) for space, key in self._books if space == self._namespace]

    def check_fits(self, payload_bytes: int) -> None:
        """The quota holds a chunk, and SQLite takes a value of that size."""
        largest_bytes = min(LARGEST_BYTES, self._max_bytes or LARGEST_BYTES)
        if payload_bytes > largest_bytes:
            raise ConfigError(
                f"{self.name}: a chunk of {payload_bytes} bytes is more than the {largest_bytes} that max_bytes and "
                "SQLite allow; raise max_bytes, or lower chunk_tokens"
            )

    def take_lost(self) -> list[tuple[StoreKey, str]]:
        """Evicted, or corrupt."""
        lost, self._lost = self._lost, []
        return lost

    def stats(self) -> TierStats:
        """A snapshot of the books."""
        return TierStats(
            num_chunks=len(self.keys()),
            used_bytes=self._used_bytes,
            max_bytes=self._max_bytes,
            num_queued=len(self._writing) + self._loading.total(),
            num_evicted=self._num_evicted,
            num_corrupt=self._num_corrupt,
            is_up=self._is_up,
        )

    def check_integrity(self) -> None:
        """The bytes in use are those of the chunks and of those being written."""
        writing_bytes = sum(len(work.job.buffer) for work in self._writing.values() if work.job is not None)
        assert self._used_bytes == sum(self._books.values()) + writing_bytes
        assert not self._writing.keys() & self._books.keys()
        assert all(count > 0 for counts in (self._loading, self._leaving) for count in counts.values())

    # ---- jobs -----------------------------------------------------------------------------------------------------

    def submit_store(self, job: TierJob) -> None:
        """TierBusy: the queue is full, the chunk is in use, or everything that could make room is."""
        row = self._namespace, bytes(job.key)
        self._check_open()
        if row in self._writing or row in self._loading or row in self._leaving:
            raise TierBusy(f"chunk {job.key.hex()} is being written, read or deleted")
        if self._threads.num_queued(Urgency.STORE) >= MAX_QUEUED:
            raise TierBusy(f"{MAX_QUEUED} chunks wait to be written")
        if not self._can_make_room(row, len(job.buffer)):
            raise TierBusy("all chunks that could make room are in use")
        self._used_bytes -= self._books.pop(row, 0)  # replaced
        work = Work(job, self._make_room(len(job.buffer)), self._take_touched())
        self._used_bytes += len(job.buffer)
        self._writing[row] = work
        self._threads.submit(Urgency.STORE, work)

    def submit_load(self, job: TierJob) -> None:
        """TierUnavailable when there is no such chunk."""
        row = self._namespace, bytes(job.key)
        self._check_open()
        if row not in self._books:
            raise TierUnavailable(f"chunk {job.key.hex()} is not in the file")
        self._loading[row] += 1
        self._threads.submit(Urgency.LOAD, Work(job, [], [], is_load=True))

    def poll(self) -> list[TierResult]:
        """Enter what the thread did into the books."""
        results = []
        for done in self._threads.take_done():
            work = done.work
            if work.job is None:
                self._leaving -= Counter(work.delete)
                self._note_health(done.error)
            elif work.is_load:
                results.append(self._finish_load(work.job, done))
            else:
                results.append(self._finish_store(work, work.job, done))
        return results

    def touch(self, keys: Sequence[StoreKey]) -> None:
        """The order of use; it is written with the next store, and at the end."""
        for key in keys:
            if (row := (self._namespace, bytes(key))) in self._books:
                self._books.move_to_end(row)
                self._touched.pop(row, None)
                self._touched[row] = None

    def remove(self, keys: Sequence[StoreKey]) -> None:
        """Misses at once; the rows are deleted in the background."""
        gone = []
        for row in ((self._namespace, bytes(key)) for key in keys):
            if row in self._writing:
                self._writing[row].is_removed = True
            elif row in self._books:
                self._used_bytes -= self._books.pop(row)
                gone.append(row)
        self._delete(gone)

    def clear(self) -> ResetReceipt:
        """Chunks of other namespaces stay."""
        own = {key: self._books[self._namespace, key] for key in self.keys()}
        self.remove([*own, *(StoreKey(key) for _, key in self._writing)])
        return ResetReceipt(self.name, len(own), sum(own.values()))

    def drain(self, timeout_s: float) -> bool:
        """Wait for the thread."""
        return self._threads.drain(timeout_s)

    def close(self) -> None:
        """End what is queued, wait a few seconds for what runs. A thread that is stuck keeps the file locked."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self._threads.close(CLOSE_S):
            logger.error("tier %s: SQLite does not answer; its file stays locked", self.name)
            return
        try:
            with self._db:
                self._note_used(self._take_touched())
        except sqlite3.Error as error:
            logger.warning("tier %s: the order of use is not kept: %s", self.name, error)
        self._db.close()

    # ---- on the tier's thread -------------------------------------------------------------------------------------

    def _do(self, work: Work) -> None:
        if work.job is None:
            with self._db:
                self._delete_rows(work.delete)
        elif work.is_load:
            self._load(work.job)
        else:
            self._store(work, work.job)

    def _store(self, work: Work, job: TierJob) -> None:
        if digest_of(job.buffer) != job.digest:
            raise TierCorrupt(f"chunk {job.key.hex()}: its bytes in host memory do not match their digest")
        row = self._namespace, bytes(job.key)
        with self._db:  # one transaction: what made room is deleted exactly when the chunk is there
            self._delete_rows([*work.delete, row])
            self._db.execute("INSERT INTO chunks VALUES (?, ?, ?, ?, 0)", (*row, job.digest, job.buffer))
            self._note_used([*work.used, row])

    def _load(self, job: TierJob) -> None:
        query = "SELECT digest, payload FROM chunks WHERE namespace = ? AND key = ?"
        found = self._db.execute(query, (self._namespace, bytes(job.key))).fetchone()
        if found is None:
            raise TierUnavailable(f"chunk {job.key.hex()} is not in the file any more")
        digest, payload = found
        if len(payload) != len(job.buffer):
            raise TierUnavailable(f"chunk {job.key.hex()} has {len(payload)} bytes, not {len(job.buffer)}")
        job.buffer[:] = payload
        if digest_of(job.buffer) != digest:  # of what the caller gets, not of what was read
            raise TierCorrupt(f"chunk {job.key.hex()}: its bytes do not match their digest")
        job.digest = digest

    def _delete_rows(self, rows: list[Row]) -> None:
        self._db.executemany("DELETE FROM chunks WHERE namespace = ? AND key = ?", rows)

    def _note_used(self, rows: list[Row]) -> None:
        order = "UPDATE chunks SET used = (SELECT 1 + max(used) FROM chunks) WHERE namespace = ? AND key = ?"
        self._db.executemany(order, rows)

    # ---- back on the owner's thread -------------------------------------------------------------------------------

    def _finish_store(self, work: Work, job: TierJob, done: Done[Work]) -> TierResult:
        row = self._namespace, bytes(job.key)
        del self._writing[row]
        error = done.error
        self._note_health(error)
        if error is None:
            self._books[row] = len(job.buffer)
            if work.is_removed:
                self.remove((job.key,))
                error = TierUnavailable(f"chunk {job.key.hex()} was removed while it was written")
        else:
            self._used_bytes -= len(job.buffer)
            self._delete([*work.delete, row])  # the books do not have them any more, the file still does
        return _result(job, error, done.seconds)

    def _finish_load(self, job: TierJob, done: Done[Work]) -> TierResult:
        row = self._namespace, bytes(job.key)
        self._loading -= Counter([row])
        if isinstance(done.error, TierCorrupt):
            self._num_corrupt += 1
            if row in self._books:
                self._lost.append((job.key, "corrupt"))
                self.remove((job.key,))
        return _result(job, done.error, done.seconds)

    def _note_health(self, error: Exception | None) -> None:
        if error is None:
            self._is_up = True
        elif isinstance(error, sqlite3.Error):
            if self._is_up:
                logger.warning("tier %s: SQLite refuses to write: %s", self.name, error)
            self._is_up = False

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _can_make_room(self, row: Row, num_bytes: int) -> bool:
        if self._max_bytes is None:
            return True
        kept_bytes = sum(self._books[each] for each in self._loading if each in self._books and each != row)
        writing_bytes = self._used_bytes - sum(self._books.values())
        return kept_bytes + writing_bytes + num_bytes <= self._max_bytes

    def _make_room(self, num_bytes: int) -> list[Row]:
        """Take the least recently used chunks out of the books until so many bytes fit. Returns them."""
        victims: list[Row] = []
        if self._max_bytes is None:
            return victims
        needed = self._used_bytes + num_bytes - self._max_bytes
        for row, size in self._books.items():
            if needed <= 0:
                break
            if row not in self._loading:
                victims.append(row)
                needed -= size
        for row in victims:
            self._used_bytes -= self._books.pop(row)
            self._num_evicted += 1
            if row[0] == self._namespace:
                self._lost.append((StoreKey(row[1]), "evicted"))
        return victims

    def _take_touched(self) -> list[Row]:
        touched, self._touched = list(self._touched), {}
        return touched

    def _delete(self, rows: list[Row]) -> None:
        if rows:
            self._leaving.update(rows)
            self._threads.submit(Urgency.CHORE, Work(None, rows, []))

    def _check_open(self) -> None:
        if self._is_closed:
            raise TierUnavailable("the tier is closed")


def _open(path: Path) -> sqlite3.Connection:
    """A connection that has the file for itself. ConfigError when somebody else has, or it is no such file."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # what SQLite makes could be read by all
        db = sqlite3.connect(path, timeout=0.0, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"cannot use {path}: {error}") from error
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")  # a transaction survives the death of the process
        db.execute("PRAGMA synchronous = NORMAL")
        with db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS chunks (namespace TEXT, key BLOB, digest BLOB, payload BLOB, used INTEGER, "
                "PRIMARY KEY (namespace, key))"
            )
            db.execute("CREATE INDEX IF NOT EXISTS by_use ON chunks (used)")
            db.execute("DELETE FROM chunks WHERE namespace = ''")  # a write, so that a locked file is refused now
    except sqlite3.Error as error:
        db.close()
        raise ConfigError(f"cannot use {path}: {error}; does another process use it?") from error
    return db


def _result(job: TierJob, error: Exception | None, seconds: float) -> TierResult:
    if error is None:
        return TierResult(job.job_id, job.key, True, job.digest, None, len(job.buffer), seconds)
    if not isinstance(error, TierError):
        cause, error = error, TierUnavailable(f"chunk {job.key.hex()}: {error}")
        error.__cause__ = cause
    return TierResult(job.job_id, job.key, False, None, error, 0, seconds)
