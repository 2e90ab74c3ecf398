"""The arena: one shared mapping, cut into slots of equal size; a slot holds one chunk.

    0        4096                       data offset (multiple of 2 MiB)
    +--------+--------------------------+----------+----------+----
    | header | generations, u64 a slot  |  slot 0  |  slot 1  | ...
    +--------+--------------------------+----------+----------+----

The scheduler side creates (owns) it, workers attach, also from other processes of that machine (`kvferry.kv.segment`).

A slot's generation rises each time the slot changes its key. A reader that copies out of a slot compares the
generation before and after; if it rose, what was read is worthless.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from kvferry.errors import ConfigError
from kvferry.kv.segment import PAGE_BYTES, SHM_DIRECTORY, NoRoom, Segment

_DATA_ALIGN_BYTES = 2 << 20
_MAGIC = b"KVFARENA"
_VERSION = 1
_HEADER = struct.Struct("<8sQQQ16s")  # magic, version, num_slots, slot_bytes, nonce


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

    def __init__(self, info: ArenaInfo, segment: Segment) -> None:
        self.info = info
        self._segment = segment
        self._is_closed = False
        whole = memoryview(segment.map)
        self._generations = whole[PAGE_BYTES : PAGE_BYTES + 8 * info.num_slots].cast("Q")
        self._data = whole[info.data_offset_bytes :]
        self.address = segment.address + info.data_offset_bytes

    @classmethod
    def create(
        cls, *, engine_id: str, num_slots: int, slot_bytes: int, directory: Path | None = None, is_named: bool = False
    ) -> Arena:
        """Make, fill with zeros and map a new arena; sweep what dead owners left first.

        `directory` None means /dev/shm; any other folder (made if missing) gives a file-backed mapping. Its file has
        a name there only if `is_named`: else none, and its memory is free again whatever ends the last process that
        maps it, SIGKILL too. `slot_bytes` is a multiple of 4096. Blocks while the memory is made (about
        0.3 s per GiB). ConfigError, with the remedy and nothing left behind, when there is no room or the folder cannot
        be written.
        """
        if num_slots < 1 or slot_bytes < PAGE_BYTES or slot_bytes % PAGE_BYTES:
            raise ConfigError(
                f"an arena needs at least one slot of a multiple of {PAGE_BYTES} bytes, "
                f"not {num_slots} slots of {slot_bytes} bytes"
            )
        folder = SHM_DIRECTORY if directory is None else directory
        nonce = secrets.token_bytes(16)
        asked = ArenaInfo(str(folder), num_slots, slot_bytes, nonce)
        try:
            segment = Segment.create(
                engine_id=engine_id, num_bytes=asked.total_bytes, header=_header(asked), folder=folder
            )
        except NoRoom as error:
            raise no_room(asked, folder, have=str(error)) from error
        except OSError as error:
            raise ConfigError(f"cannot make an arena in {folder}: {error}; set arena_dir to another folder") from error
        if not is_named:
            segment.unlink()
        return cls(replace(asked, path=segment.path), segment)

    @classmethod
    def attach(cls, info: ArenaInfo) -> Arena:
        """Map an arena that another process or thread owns.

        HostError when it is gone (owner ended), out of reach (other machine, container or user), or is not the one
        `info` describes.
        """
        return cls(info, Segment.attach(info.path, info.total_bytes, _header(info), what="arena"))

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
        assert self._segment.is_owner, "only the owner of an arena gives slots away"
        self._generations[slot] += 1
        return self._generations[slot]

    def close(self) -> None:
        """Give the mapping up. Idempotent. No copy by address may be under way."""
        self._is_closed = True
        self._generations.release()
        self._data.release()
        self._segment.close()

    def _check(self, slot: int) -> None:
        if self._is_closed:
            raise ValueError("the arena is closed")
        if not 0 <= slot < self.info.num_slots:
            raise IndexError(f"slot {slot} is outside the arena's {self.info.num_slots} slots")


def _header(info: ArenaInfo) -> bytes:
    return _HEADER.pack(_MAGIC, _VERSION, info.num_slots, info.slot_bytes, info.nonce)


def no_room(info: ArenaInfo, folder: Path, have: str) -> ConfigError:
    """The error of an arena that does not fit."""
    return ConfigError(
        f"no room for the host arena in {folder}: {info.total_bytes} bytes are needed ({info.num_slots} slots of "
        f"{info.slot_bytes} bytes), {have}; lower cpu_bytes_to_use, give the container more shared memory "
        "(docker --shm-size), or set arena_dir to a folder on a disk"
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
