"""Shared memory: files in /dev/shm (or any folder), mapped, owned by one process, swept when it has died.

The owner holds an exclusive `flock` on the file for life, so a segment whose lock can be had belongs to a dead owner
and is swept when one who was attached lets go of it, or when the next one is created in that folder. One that only
processes around its owner attach to needs no name (`unlink`), and goes with the last of them.

Not `multiprocessing.shared_memory`: in Python 3.11 an attacher's exit unlinks it. What lies in a segment is its user's
business; all begin with a header that tells who.
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
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from kvferry.errors import HostError
from kvferry.kv.space import space_at

logger = logging.getLogger(__name__)

SHM_DIRECTORY = Path("/dev/shm")
PAGE_BYTES = 4096
_DESCRIPTORS = "/proc/"
_DESCRIPTOR = re.compile(r"/proc/([1-9][0-9]{0,6})/fd/[0-9]{1,7}")  # no process id of Linux is longer
_NAME = re.compile(r"kvferry-[A-Za-z0-9]+-[0-9]+-[0-9a-f]{16}")


class NoRoom(OSError):
    """The folder's file system has too few free bytes; the text says how many it has."""


class Segment:
    """One mapped file. Built by `create` (owner) or `attach`, which takes its `path`; never grows or shrinks."""

    def __init__(self, path: str, fd: int, num_bytes: int, *, is_owner: bool, populate: bool) -> None:
        self.path = path
        self.is_owner = is_owner
        self._fd = fd  # the owner's carries the lock
        self._is_closed = False
        self.map = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    @classmethod
    def create(cls, *, engine_id: str, num_bytes: int, header: bytes, folder: Path) -> Segment:
        """Make, fill with zeros and map a new file (0600) that starts with `header`; sweep those of dead owners first.

        Makes the folder if missing. Blocks while the memory is made (about 0.3 s per GiB); every page is touched.
        NoRoom when it does not fit, another OSError when the folder cannot be used; nothing is left behind then.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sweep_dead_segments(folder)
        if (free_bytes := space_at(folder).free_bytes) < num_bytes:
            raise NoRoom(f"{free_bytes} bytes are free")
        path = str(folder / _new_name(engine_id))
        fd = _create_locked(path)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
            os.pwrite(fd, header, 0)
            return cls(path, fd, num_bytes, is_owner=True, populate=True)
        except BaseException as error:
            os.unlink(path)
            os.close(fd)
            if isinstance(error, OSError):
                raise NoRoom(str(error)) from error
            raise

    @classmethod
    def attach(cls, path: str, num_bytes: int, header: bytes, *, what: str, populate: bool = True) -> Segment:
        """Map a segment that another process or thread owns. `populate` touches every page now.

        HostError, which calls it `what`, when it is gone (owner ended, other machine or container), or has another
        size or header.
        """
        has_name = _has_name(path)
        try:
            if not has_name and not stat.S_ISREG(os.stat(path).st_mode):
                raise HostError(f"{path} is no {what}: it is not a regular file")
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_NOFOLLOW if has_name else 0))
        except OSError as error:
            why = "its owner has ended, or runs on another machine or in a container that does not share this folder"
            if not has_name:
                why = (
                    "its owner has ended, or cannot be seen in this process's /proc: another machine, another "
                    "container, another user, or rules against looking into other processes (SELinux, AppArmor)"
                )
            elif isinstance(error, PermissionError):
                why = "its owner runs as another user, who alone can open the file: run both processes as one user"
            raise HostError(f"cannot map the {what} {path}: {error.strerror}; {why}") from error
        try:
            _check_is(fd, path, num_bytes, header, what)
            return cls(path, fd, num_bytes, is_owner=False, populate=populate)
        except BaseException:
            os.close(fd)
            raise

    @property
    def inode(self) -> tuple[int, int]:
        """Device and inode."""
        about = os.fstat(self._fd)
        return about.st_dev, about.st_ino

    def is_owner_alive(self) -> bool:
        """For those attached: False once the owner's process has ended or closed the segment."""
        return _is_locked(self._fd)

    @property
    def descriptor(self) -> str:
        """The owner's, in the /proc of those who see its process: a second path, for as long as it has not let go."""
        return f"{_DESCRIPTORS}{os.getpid()}/fd/{self._fd}"

    def unlink(self) -> None:
        """Owner only: no file is left behind from now on, even if all who have it mapped are killed.

        `path` is a descriptor of this process now, by which those who see this process in their /proc attach.
        """
        assert self.is_owner, "only the owner of a segment takes its name away"
        os.unlink(self.path)
        self.path = self.descriptor

    def close(self) -> None:
        """Give the mapping up; the owner unlinks the file too, and so does who sees that the owner has ended.

        Idempotent. No copy by address may be under way. While somebody still holds `map` or a buffer of it (a tensor),
        the mapping stays until the last has gone.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if _has_name(self.path) and (self.is_owner or not self.is_owner_alive()):
            with suppress(FileNotFoundError):
                os.unlink(self.path)
        if self.is_owner:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping has a descriptor of its own, with the same lock
        del self.map
        os.close(self._fd)


def is_segment_path(path: str, folders: Collection[Path] = (SHM_DIRECTORY,)) -> bool:
    """Whether a segment could lie there, in one of the folders; for paths that others have named."""
    return Path(path).parent in folders and "\0" not in path and _NAME.fullmatch(os.path.basename(path)) is not None


def is_descriptor(path: str) -> bool:
    """Whether this is the path of a process's descriptor; for paths that others have named."""
    return _DESCRIPTOR.fullmatch(path) is not None


def has_let_go(descriptor: str, inode: tuple[int, int]) -> bool:
    """Whether the owner whose `descriptor` led to the file (device, inode) has ended or closed it, for certain.

    Only of processes that this one counts by the same ids (`process_ids`). False where that cannot be told.
    """
    if (parts := _DESCRIPTOR.fullmatch(descriptor)) is None:
        return False
    try:
        os.kill(int(parts[1]), 0)
        about = os.stat(descriptor)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except OSError:  # another user's
        return False
    return (about.st_dev, about.st_ino) != inode


def process_ids() -> str:
    """What counts this machine's processes for this one: two that say the same know a process by one id."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def sweep_dead_segments(folder: Path) -> list[Path]:
    """Unlink the segments of dead owners in `folder`; returns their paths. Others' files are left alone."""
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
        logger.info("swept %d segment(s) of dead processes in %s", len(swept), folder)
    return swept


def _has_name(path: str) -> bool:
    return not path.startswith(_DESCRIPTORS)


def _new_name(engine_id: str) -> str:
    readable = re.sub("[^A-Za-z0-9]", "", engine_id)[:16] or "engine"
    return f"kvferry-{readable}-{os.getpid()}-{secrets.token_hex(8)}"


def _check_is(fd: int, path: str, num_bytes: int, header: bytes, what: str) -> None:
    about = os.fstat(fd)
    is_named_once = about.st_nlink == (1 if _has_name(path) else 0)
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077 or not is_named_once:
        raise HostError(
            f"{path} is not mapped as {what}: another user who can open it could end this process by truncating the "
            "file. It must be a file of this user, with mode 0600 and a single name: run both engines as one user"
        )
    if about.st_size != num_bytes or os.pread(fd, len(header), 0) != header:
        raise HostError(f"{path} is not the announced {what}: nonce, version or size differ")


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def _create_locked(path: str) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # a sweeper had the lock first, took the file for a dead owner's and unlinked it: once more
