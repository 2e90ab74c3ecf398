"""The folder of the disk tier and all that is done to it; one call, one action, each may block.

    <path>/FORMAT                          "kvferry-fs 1"
           LOCK                            exclusive flock of the process that uses the folder; holds its pid
           journal                         order of use (disk_journal)
           <namespace>/<xx>/<key hex>.kv   one chunk (disk_format)
           tmp/                            files being written; swept at open
           quarantine/                     files that were refused

Files are 0600, folders 0700: KV reveals prompts. Only a folder of this user that nobody else can write to is used, and
no link in it is followed: who can write there could have files elsewhere deleted, or make the engine answer wrongly. A
file appears under its name whole or not at all (tmp + rename).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import socket
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvferry.errors import ConfigError, TierCorrupt, TierUnavailable
from kvferry.kv.keys import digest as digest_of
from kvferry.offloading.tiers.disk_format import HEADER_BYTES, ChunkFormat
from kvferry.types import Namespace, StoreKey

FOLDER_FORMAT = "kvferry-fs 1"
_HEX = re.compile(r"[0-9a-f]+")
_CHUNK_NAME = re.compile(r"(([0-9a-f]{2})+)\.kv")
_LOCK_TEXT_BYTES = 100  # always written over as a whole: works on a full disk too
OnStep = Callable[[str], None]


class ChunkFile(NamedTuple):
    """A file of the folder: its name relative to it, and its size."""

    name: str
    file_bytes: int


class FoundChunk(NamedTuple):
    """A chunk file that the scan met."""

    namespace: str
    key: StoreKey
    file_bytes: int
    written_ns: int


class ChunkFolder:
    """An opened, locked folder. Methods may be called from several threads, about different chunks."""

    def __init__(self, path: Path, namespace: Namespace, *, fsync: bool, on_step: OnStep | None) -> None:
        """Make it where missing, lock it, sweep what a killed process left half-written.

        ConfigError: not a folder, not writable, writable for other users, of another format, or in use by
        another process (its pid is named).
        """
        if not _HEX.fullmatch(namespace.digest):
            raise ConfigError(f"a namespace digest must be lower-case hex, not {namespace.digest!r}")
        self.path = path
        self._format = ChunkFormat(namespace)
        self._namespace = namespace.digest
        self._fsync = fsync
        self._on_step = on_step
        self._tmp_number = itertools.count()
        self._restoring = threading.Lock()
        self.num_losses = 0
        """How often the folder was gone with all that was in it, and was made anew."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(path)
            self._lock_fd = _lock(path / "LOCK")
            self._device = os.fstat(self._lock_fd).st_dev
            _leave_when_forked(self)
        except OSError as error:
            raise ConfigError(f"cannot use {path} as a store, it is no writable folder: {error.strerror}") from error
        try:
            self._prepare()
        except OSError as error:
            self.close()
            raise ConfigError(f"cannot use {path} as a store: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        if self._lock_fd >= 0:
            _unlock(self._lock_fd)
            self._lock_fd = -1

    def leave(self) -> None:
        """In a forked child: the lock is its parent's, and is not kept beyond the parent's end."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def scan(self) -> Iterator[FoundChunk]:
        """All chunk files, of every namespace; their content is not looked at."""
        for namespace in _subfolders(self.path):
            for prefix in _subfolders(f"{self.path}/{namespace}"):
                with os.scandir(f"{self.path}/{namespace}/{prefix}") as found:
                    for entry in found:
                        match = _CHUNK_NAME.fullmatch(entry.name)
                        if match and match[1].startswith(prefix) and entry.is_file(follow_symlinks=False):
                            status = entry.stat(follow_symlinks=False)
                            key = StoreKey(bytes.fromhex(match[1]))
                            yield FoundChunk(namespace, key, status.st_size, status.st_mtime_ns)

    def scan_quarantine(self) -> list[ChunkFile]:
        """What lies in quarantine, oldest first."""
        with os.scandir(self.path / "quarantine") as found:
            files = [(e.stat(follow_symlinks=False), e.name) for e in found if e.is_file(follow_symlinks=False)]
        files.sort(key=lambda file: file[0].st_mtime_ns)
        return [ChunkFile(f"quarantine/{name}", status.st_size) for status, name in files]

    def write(self, key: StoreKey, payload: memoryview, digest: bytes) -> None:
        """Write the chunk under its name; when this returns it survives the process. OSError: nothing is left of it.

        A folder that is gone, or lacks its `tmp`, is made again first (`restore`).
        """
        tmp = f"{self.path}/tmp/{next(self._tmp_number)}"
        try:
            fd = _create(tmp)
        except FileNotFoundError:
            self.restore()
            fd = _create(tmp)
        try:
            try:
                self._write_payload(fd, self._format.header(key, len(payload), digest), payload)
                if self._fsync:
                    os.fdatasync(fd)
            finally:
                os.close(fd)
            self._step("chunk-rename")
            self._move(tmp, f"{self.path}/{chunk_name(self._namespace, key)}")
        except BaseException:
            with suppress(OSError):
                os.unlink(tmp)
            raise
        self._step("chunk-written")

    def read(self, key: StoreKey, payload: memoryview) -> bytes:
        """Read the chunk into `payload`; returns its proved digest.

        TierCorrupt, UnknownFormat, TierUnavailable, OSError (FileNotFoundError: it is gone): what is in `payload` is
        worthless then.
        """
        path = f"{self.path}/{chunk_name(self._namespace, key)}"
        header = bytearray(HEADER_BYTES)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise TierCorrupt(f"chunk {key.hex()}: {path} is no file")
            # One byte more than there should be, to see that there is no more.
            num_read = _read_all(
                fd, [memoryview(header), payload, memoryview(bytearray(1))], HEADER_BYTES + len(payload)
            )
        finally:
            os.close(fd)
        digest = self._format.check(header, key, len(payload))
        if num_read != HEADER_BYTES + len(payload) or digest_of(payload) != digest:
            raise TierCorrupt(f"chunk {key.hex()}: the bytes in {path} do not match their digest")
        return digest

    def unlink(self, name: str) -> None:
        """Delete a file. One that is gone already is fine."""
        with suppress(FileNotFoundError):
            os.unlink(f"{self.path}/{name}")

    def quarantine(self, key: StoreKey) -> str | None:
        """Set the chunk's file aside; returns its new name, None when there is no file (any more)."""
        name = f"quarantine/{self._namespace}-{key.hex()}-{time.time_ns():x}.kv"
        try:
            os.rename(f"{self.path}/{chunk_name(self._namespace, key)}", f"{self.path}/{name}")
        except FileNotFoundError:
            return None
        return name

    def restore(self) -> None:
        """Make again what is missing of the folder, and lock it where the locked one is gone.

        OSError, TierUnavailable: it cannot be; the folder is as before. On another file system than at the start (the
        disk is not mounted) only a folder that holds a store already is taken.
        """
        with self._restoring:
            if not self._is_mine():
                if _device_of(self.path) != self._device and not (self.path / "FORMAT").exists():
                    raise TierUnavailable(f"{self.path} is not on the file system it was on: is it mounted?")
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                was_empty = not (self.path / "FORMAT").exists()
                try:
                    _check_private(self.path)
                    lock_fd = _lock(self.path / "LOCK")
                except ConfigError as error:  # another process was quicker, or other users can write there
                    raise TierUnavailable(str(error)) from error
                _unlock(self._lock_fd)
                self._lock_fd = lock_fd
                self._device = os.fstat(lock_fd).st_dev
                self.num_losses += was_empty
            try:
                self._prepare_marker()
                self._make_folders()
            except ConfigError as error:
                raise TierUnavailable(str(error)) from error

    def probe(self, num_bytes: int) -> None:
        """See whether a file of so many bytes can be written: as `restore`, and OSError when it cannot."""
        self.restore()
        tmp = f"{self.path}/tmp/{next(self._tmp_number)}"
        fd = _create(tmp)
        try:
            _write_all(fd, [memoryview(bytes(num_bytes))])
        finally:
            os.close(fd)
            os.unlink(tmp)

    def _is_mine(self) -> bool:
        """The lock that this process holds is the folder's."""
        try:
            found = os.stat(self.path / "LOCK", follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._lock_fd))

    def _write_payload(self, fd: int, header: bytes, payload: memoryview) -> None:
        if self._on_step is None:
            _write_all(fd, [memoryview(header), payload])
            return
        half = len(payload) // 2
        _write_all(fd, [memoryview(header), payload[:half]])
        self._step("chunk-write")
        _write_all(fd, [payload[half:]])

    def _move(self, tmp: str, target: str) -> None:
        folder = os.path.dirname(target)
        try:
            os.rename(tmp, target)
        except FileNotFoundError:  # the first chunk of its folder
            os.makedirs(folder, mode=0o700, exist_ok=True)
            os.rename(tmp, target)
        if self._fsync:
            try:
                _sync_folder(folder)
            except OSError:
                os.unlink(target)
                raise

    def _prepare(self) -> None:
        self._prepare_marker()
        self._make_folders()
        tmp_fd = os.open(self.path / "tmp", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for leftover in os.listdir(tmp_fd):
                os.unlink(leftover, dir_fd=tmp_fd)
        finally:
            os.close(tmp_fd)

    def _make_folders(self) -> None:
        for name in ("tmp", "quarantine", self._namespace):
            folder = self.path / name
            folder.mkdir(mode=0o700, exist_ok=True)
            _check_private(folder, may_be_link=False)

    def _prepare_marker(self) -> None:
        marker = self.path / "FORMAT"
        try:
            found = _read_marker(marker)
        except FileNotFoundError:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            fd = os.open(f"{marker}.tmp", flags, 0o600)
            try:
                os.write(fd, f"{FOLDER_FORMAT}\n".encode())
            finally:
                os.close(fd)
            os.rename(f"{marker}.tmp", marker)
            found = FOLDER_FORMAT
        if found != FOLDER_FORMAT:
            raise ConfigError(
                f"{self.path} holds a store of format {found[:80]!r}, this program knows {FOLDER_FORMAT!r}; nothing "
                "was changed: set path to another folder"
            )

    def _step(self, name: str) -> None:
        if self._on_step is not None:
            self._on_step(name)


def chunk_name(namespace: str, key: bytes) -> str:
    """Name of a chunk's file, relative to the store's folder."""
    key_hex = key.hex()
    return f"{namespace}/{key_hex[:2]}/{key_hex}.kv"


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _device_of(path: Path) -> int:
    """Of the file system that the path is on, or would be made on."""
    while True:
        try:
            return os.stat(path).st_dev
        except FileNotFoundError:
            path = path.parent


def why_unusable(path: Path) -> str | None:
    """Why the folder cannot be opened as a store now, with the remedy; None: it can. Makes and changes nothing."""
    try:
        _check_private(path)
        fd = os.open(path / "LOCK", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except ConfigError as error:
        return str(error)
    except OSError as error:
        return f"cannot use {path} as a store: {error}"
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _in_use(path, fd)
    finally:
        os.close(fd)
    return None


def _check_private(path: Path, *, may_be_link: bool = True) -> None:
    """ConfigError unless this is a folder that this user owns and nobody else can write to."""
    about = os.stat(path, follow_symlinks=may_be_link)
    if stat.S_ISLNK(about.st_mode):
        raise ConfigError(f"{path} is a link, and what it points to is not touched: remove it")
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise ConfigError(
            f"{path} cannot be used in a store: other users can write there, or it is another user's; take "
            "their right away (chmod go-w), or set path to a folder of your own, or to one that is not there yet"
        )


def _read_marker(path: Path) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.read(fd, 1000).decode("utf-8", "replace").strip()
    finally:
        os.close(fd)


def _leave_when_forked(folder: ChunkFolder) -> None:
    known = weakref.ref(folder)

    def leave() -> None:
        if (living := known()) is not None:
            living.leave()

    os.register_at_fork(after_in_child=leave)


def _unlock(fd: int) -> None:
    """Also where a forked child has a copy of the descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def _in_use(path: Path, fd: int) -> str:
    holder = os.pread(fd, _LOCK_TEXT_BYTES, 0).decode("utf-8", "replace").strip() or "unknown"
    return f"{path} is in use by another process (pid {holder}); end it, or set path to another folder"


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = _in_use(path.parent, fd)
        os.close(fd)
        raise ConfigError(text) from None
    except BaseException:
        os.close(fd)
        raise
    os.pwrite(fd, f"{os.getpid()} on {socket.gethostname()}".ljust(_LOCK_TEXT_BYTES).encode()[:_LOCK_TEXT_BYTES], 0)
    return fd


def _subfolders(path: str | Path) -> list[str]:
    with os.scandir(path) as found:
        return [entry.name for entry in found if _HEX.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]


def _write_all(fd: int, buffers: list[memoryview]) -> None:
    while buffers:
        buffers = _advance(buffers, os.writev(fd, buffers))


def _read_all(fd: int, buffers: list[memoryview], expected_bytes: int) -> int:
    """Fill the buffers as far as the file goes; returns how many bytes that is.

    A read that ends exactly where the file should ends there: asking again costs a wait for the interpreter lock.
    """
    num_read = 0
    while buffers and num_read != expected_bytes and (num_bytes := os.preadv(fd, buffers, num_read)):
        num_read += num_bytes
        buffers = _advance(buffers, num_bytes)
    return num_read


def _advance(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the buffers after their first `num_bytes`."""
    while buffers and num_bytes >= len(buffers[0]):
        num_bytes -= len(buffers[0])
        buffers = buffers[1:]
    return [buffers[0][num_bytes:], *buffers[1:]] if buffers else []


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
