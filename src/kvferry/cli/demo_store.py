"""The demo's own look at the disk tier's files: it shares no code with the store, so that it can vouch for it.

A chunk's file is named by its key: 4096 bytes of header, then the payload, the chunk's blocks one after another.
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_HEADER_BYTES = 4096
_READ_THREADS = 2  # as many as the disk tier reads with


@dataclass(frozen=True, slots=True)
class StoredChunks:
    """The files of one prompt's chunks, in prompt order."""

    files: list[Path]

    @classmethod
    def find(cls, folder: Path, keys: list[str]) -> StoredChunks:
        """The files in `folder` (searched deeply) named by `keys` (hex), up to the first that is missing."""
        by_key = {path.stem: path for path in folder.rglob("*.kv")}
        files = []
        for key in keys:
            if key not in by_key:
                break
            files.append(by_key[key])
        return cls(files)

    def block_digests(self, blocks_per_chunk: int) -> list[str]:
        """SHA-256 (hex) of each stored block, in prompt order. Reads every file."""
        digests = []
        for file in self.files:
            payload = file.read_bytes()[_HEADER_BYTES:]
            size = len(payload) // blocks_per_chunk
            digests += [hashlib.sha256(payload[i * size : (i + 1) * size]).hexdigest() for i in range(blocks_per_chunk)]
        return digests

    def flip_byte(self, index: int) -> None:
        """Flip all bits of the byte in the middle of chunk `index`'s payload."""
        with self.files[index].open("r+b") as file:
            at = _HEADER_BYTES + (os.fstat(file.fileno()).st_size - _HEADER_BYTES) // 2
            old = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([old ^ 0xFF]), at)

    def leave_page_cache(self) -> None:
        """Write the files through and drop them from the page cache, so that the next read is the disk's."""
        for file in self.files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read_rate(self) -> float:
        """Bytes per second of reading all files from the disk, as many at a time as the disk tier does."""
        size = max(file.stat().st_size for file in self.files)
        buffers = [bytearray(size) for _ in range(_READ_THREADS)]  # zeroed, hence in memory already

        def read_share(worker: int) -> int:
            num_bytes = 0
            for file in self.files[worker::_READ_THREADS]:
                with file.open("rb", buffering=0) as stream:
                    num_bytes += stream.readinto(buffers[worker]) or 0
            return num_bytes

        self.leave_page_cache()
        started = time.monotonic()
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            num_bytes = sum(pool.map(read_share, range(_READ_THREADS)))
        return num_bytes / (time.monotonic() - started)
