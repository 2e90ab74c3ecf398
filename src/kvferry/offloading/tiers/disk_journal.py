"""The order of use, kept over restarts.

The files are the truth about what is stored; the journal only says in which order chunks were used. It is a sequence of
16-byte records (CRC-32 of the rest u32, op u32, chunk id u64). Records that do not match their CRC are ignored: a torn
tail, or damage. Opening and outgrowing rewrite it to one record per living chunk (tmp + rename).
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum

logger = logging.getLogger(__name__)

_RECORD = struct.Struct("<IIQ")
_CRC = struct.Struct("<I")
_BODY = struct.Struct("<IQ")
RECORD_BYTES = _RECORD.size
SMALLEST_LIMIT_BYTES = 4096


class Use(IntEnum):
    """What happened to a chunk."""

    USED = 1
    GONE = 2


Note = tuple[Use, int]


class Journal:
    """Append-only; any thread may append (one at a time). Never larger than max(4096, twice what lives) plus one batch.

    A failure costs order, nothing else: it is logged and not raised. On a full disk there may be no journal at all.
    """

    def __init__(self, path: str, living: Iterable[int], on_step: Callable[[str], None] | None) -> None:
        """Open, or make; forget what is not `living`."""
        self._path = path
        self._on_step = on_step
        self._lock = threading.Lock()
        self._fd = -1
        self._size_bytes = self._limit_bytes = 0
        known = frozenset(living)
        try:
            self._rewrite([chunk_id for chunk_id in read_order(path) if chunk_id in known])
        except OSError as error:
            logger.warning("the order of use cannot be kept in %s: %s", path, error)

    def append(self, notes: Sequence[Note]) -> None:
        """Write these. Of several about one chunk the last counts."""
        last: dict[int, Use] = {}
        for use, chunk_id in notes:
            last.pop(chunk_id, None)
            last[chunk_id] = use
        data = _pack(last.items())
        with self._lock:
            if not data or self._fd < 0:
                return
            # What goes lowers the limit at once: the journal of a cleared folder must not outweigh the rest.
            self._limit_bytes -= 2 * RECORD_BYTES * sum(use is Use.GONE for use in last.values())
            try:
                if self._size_bytes + len(data) > max(SMALLEST_LIMIT_BYTES, self._limit_bytes):
                    self._rewrite(read_order(self._path))
                self._write(data)
                self._size_bytes += len(data)
            except OSError as error:
                logger.warning("the order of use could not be written to %s: %s", self._path, error)
                self._cut_back()

    def begin_anew(self) -> None:
        """The file is gone, with all that it told of."""
        with self._lock:
            try:
                self._rewrite([])
            except OSError as error:
                logger.warning("the order of use cannot be kept in %s: %s", self._path, error)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _write(self, data: bytes) -> None:
        if self._on_step is None:
            _write_all(self._fd, data)
        else:
            half = len(data) - RECORD_BYTES // 2
            _write_all(self._fd, data[:half])
            self._on_step("index-write")
            _write_all(self._fd, data[half:])

    def _rewrite(self, order: list[int]) -> None:
        data = _pack((chunk_id, Use.USED) for chunk_id in order)
        tmp = f"{self._path}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(tmp, flags, 0o600)
        try:
            _write_all(fd, data)
            if self._on_step is not None:
                self._on_step("index-rewrite")
            os.rename(tmp, self._path)
        except BaseException:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd
        self._size_bytes = len(data)
        self._limit_bytes = 2 * len(data)

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._fd, self._size_bytes)
        except OSError:  # what comes after half a record could not be read: better no journal
            os.close(self._fd)
            self._fd = -1


def read_order(path: str) -> list[int]:
    """Ids of the chunks the journal knows, least recently used first. A missing journal knows none."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            data = file.read()
    except FileNotFoundError:
        return []
    order: dict[int, None] = {}
    for crc, use, chunk_id in _RECORD.iter_unpack(data[: len(data) // RECORD_BYTES * RECORD_BYTES]):
        if zlib.crc32(_BODY.pack(use, chunk_id)) != crc:
            continue
        order.pop(chunk_id, None)
        if use == Use.USED:
            order[chunk_id] = None
    return list(order)


def _pack(notes: Iterable[tuple[int, Use]]) -> bytes:
    bodies = (_BODY.pack(use, chunk_id) for chunk_id, use in notes)
    return b"".join(_CRC.pack(zlib.crc32(body)) + body for body in bodies)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
