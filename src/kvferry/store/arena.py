"""The arena: one named shared mapping, cut into slots of equal size; a slot holds one chunk.

    0        4096                       data offset (multiple of 2 MiB)
    +--------+--------------------------+----------+----------+----
    | header | generations, u64 a slot  |  slot 0  |  slot 1  | ...
    +--------+--------------------------+----------+----------+----

The scheduler side creates (owns) it, workers attach by name, also from other processes. The owner holds an exclusive
`flock` on the file for life, so a segment whose lock can be had belongs to a dead owner and is swept when the next
arena is created in that directory. Not `multiprocessing.shared_memory`: in Python 3.11 an attacher's exit unlinks it.

A slot's generation rises each time the slot changes its key. A reader that copies out of a slot compares the
generation before and after; if it rose, what was read is worthless.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import re
import secrets
import stat
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvferry.errors import ConfigError, HostError
from kvferry.store.space import space_at

logger = logging.getLogger(__name__)

SHM_DIRECTORY = Path("/dev/shm")
PAGE_BYTES = 4096
_DATA_ALIGN_BYTES = 2 << 20
_MAGIC = b"KVFARENA"
_VERSION = 1
_HEADER = struct.Struct("<8sQQQ16s")  # magic, version, num_slots, slot_bytes, nonce
_NAME = re.compile(r"kvferry-[A-Za-z0-9]+-\d+-[0-9a-f]{16}")
_MAP_FLAGS = mmap.MAP_SHARED | mmap.MAP_POPULATE


@dataclass(frozen=True)
class ArenaInfo:
    """All another process needs to map the arena; travels in step metadata."""

    path: str
    num_slots: int
    slot_bytes: int
    nonce: bytes

    @property
    def data_offset_bytes(self) -> int:
        """Where slot 0 starts in the file."""
        return _round_up(PAGE_BYTES + 8 * self.num_slots, _DATA_ALIGN_BYTES)

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self.data_offset_bytes + self.num_slots * self.slot_bytes


class Arena:
    """Slots in shared memory. Built by `create` (owner) or `attach`; both map (and touch) every page at once."""

    def __init__(self, info: ArenaInfo, fd: int, *, is_owner: bool) -> None:
        self.info = info
        self._fd = fd  # the owner's carries the lock
        self._is_owner = is_owner
        self._is_closed = False
        self._map = mmap.mmap(fd, info.total_bytes, flags=_MAP_FLAGS)
        whole = memoryview(self._map)
        self._generations = whole[PAGE_BYTES : PAGE_BYTES + 8 * info.num_slots].cast("Q")
        self._data = whole[info.data_offset_bytes :]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._data))

    @classmethod
    def create(cls, *, engine_id: str, num_slots: int, slot_bytes: int, directory: Path | None = None) -> Arena:
        """Make, fill with zeros and map a new arena; sweep those of dead owners first.

        `directory` None means /dev/shm; any other folder (made if missing) gives a file-backed mapping. `slot_bytes`
        is a multiple of 4096. Blocks while the memory is made (about 0.3 s per GiB). ConfigError, with the remedy and
        nothing left behind, when there is no room or the folder cannot be written.
        """
        if num_slots < 1 or slot_bytes < PAGE_BYTES or slot_bytes % PAGE_BYTES:
            raise ConfigError(
                f"an arena needs at least one slot of a multiple of {PAGE_BYTES} bytes, "
                f"not {num_slots} slots of {slot_bytes} bytes"
            )
        folder = SHM_DIRECTORY if directory is None else directory
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            sweep_dead_arenas(folder)
            info = ArenaInfo(str(folder / _new_name(engine_id)), num_slots, slot_bytes, secrets.token_bytes(16))
            if (free_bytes := space_at(folder).free_bytes) < info.total_bytes:
                raise no_room(info, folder, have=f"{free_bytes} bytes are free")
            fd = _create_locked(info.path)
        except OSError as error:
            raise ConfigError(f"cannot make an arena in {folder}: {error}; set arena_dir to another folder") from error
        try:
            os.posix_fallocate(fd, 0, info.total_bytes)
            os.pwrite(fd, _header(info), 0)
            return cls(info, fd, is_owner=True)
        except BaseException as error:
            os.unlink(info.path)
            os.close(fd)
            if isinstance(error, OSError):
                raise no_room(info, folder, have=str(error)) from error
            raise

    @classmethod
    def attach(cls, info: ArenaInfo) -> Arena:
        """Map an arena that another process or thread owns. Never unlinks it.

        HostError when it is gone (owner ended, other machine, other container) or is not the one `info` describes.
        """
        try:
            fd = os.open(info.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise HostError(
                f"cannot map the arena {info.path}: {error.strerror}; its owner has ended, or runs on another machine "
                "or in a container that does not share this folder"
            ) from error
        try:
            _check_is(info, fd)
            return cls(info, fd, is_owner=False)
        except BaseException:
            os.close(fd)
            raise

    def slot_address(self, slot: int) -> int:
        """Address in this process of the first byte of the slot. Valid until `close`."""
        self._check(slot)
        return self.address + slot * self.info.slot_bytes

    def slot_view(self, slot: int) -> memoryview:
        """The slot as writable uint8, `slot_bytes` long. A view that outlives `close` keeps the mapping alive."""
        self._check(slot)
        start = slot * self.info.slot_bytes
        return self._data[start : start + self.info.slot_bytes]

    def generation(self, slot: int) -> int:
        """How often the slot has been given to a key so far; shared with all who are attached."""
        self._check(slot)
        return self._generations[slot]

    def bump(self, slot: int) -> int:
        """Owner only: the slot is given to another key. Returns the new generation."""
        self._check(slot)
        assert self._is_owner, "only the owner of an arena gives slots away"
        self._generations[slot] += 1
        return self._generations[slot]

    def close(self) -> None:
        """Give the mapping up; the owner also unlinks the file. Idempotent. No copy by address may be under way."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._is_owner:
            with suppress(FileNotFoundError):
                os.unlink(self.info.path)
        self._generations.release()
        self._data.release()
        with suppress(BufferError):  # somebody still holds a slot view: the mapping goes with the last of them
            self._map.close()
        os.close(self._fd)

    def _check(self, slot: int) -> None:
        if self._is_closed:
            raise ValueError("the arena is closed")
        if not 0 <= slot < self.info.num_slots:
            raise IndexError(f"slot {slot} is outside the arena's {self.info.num_slots} slots")


def sweep_dead_arenas(folder: Path) -> list[Path]:
    """Unlink the arenas of dead owners in `folder`; returns their paths. Others' files are left alone."""
    swept = []
    for path in folder.iterdir():
        if not _NAME.fullmatch(path.name):
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                os.unlink(path)
                swept.append(path)
        except OSError:  # locked: the owner lives
            continue
        finally:
            os.close(fd)
    if swept:
        logger.info("swept %d arena(s) of dead processes in %s", len(swept), folder)
    return swept


def _new_name(engine_id: str) -> str:
    readable = re.sub("[^A-Za-z0-9]", "", engine_id)[:16] or "engine"
    return f"kvferry-{readable}-{os.getpid()}-{secrets.token_hex(8)}"


def _header(info: ArenaInfo) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, info.num_slots, info.slot_bytes, info.nonce)


def _check_is(info: ArenaInfo, fd: int) -> None:
    if os.fstat(fd).st_size != info.total_bytes or os.pread(fd, _HEADER.size, 0) != _header(info):
        raise HostError(f"{info.path} is not the arena it is said to be: nonce, version or size differ")


def _create_locked(path: str) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # a sweeper had the lock first, took the file for a dead owner's and unlinked it: once more


def no_room(info: ArenaInfo, folder: Path, have: str) -> ConfigError:
    """The error of an arena that does not fit."""
    return ConfigError(
        f"no room for the host arena in {folder}: {info.total_bytes} bytes are needed ({info.num_slots} slots of "
        f"{info.slot_bytes} bytes), {have}; lower cpu_bytes_to_use, give the container more shared memory "
        "(docker --shm-size), or set arena_dir to a folder on a disk"
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
