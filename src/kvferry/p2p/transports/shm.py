"""Shared memory: the KV pool itself lies in a named mapping, so a peer on this host reads or writes it in one copy.

    host: torch.zeros(n, int8)  ──inside SharedPool.context()──►  | header | the pool's n bytes |   /dev/shm/kvferry-...
    peer: maps the file by name; copies between its own pool and ours

Every copy is made by this process's own thread, for READ and for WRITE, so once the thread has stopped copying for a
peer, nothing of it lands any more: closing is a real fence. A peer that is stopped can still be read and written. The
owner's lock on the file tells a peer that has ended; it is checked before and after every transfer.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.errors import ConfigError, HostError, TransferError
from kvferry.kv.segment import (
    PAGE_BYTES,
    SHM_DIRECTORY,
    Segment,
    has_let_go,
    is_descriptor,
    is_segment_path,
    process_ids,
)
from kvferry.kv.space import space_at
from kvferry.p2p.transports.copying import copy_pieces
from kvferry.p2p.transports.threaded import Step, ThreadedTransport, Transfer, decode_blob
from kvferry.p2p.transports.transport import Ints, PeerHandle, TransferOp, TransportCapabilities, TransportSetup

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<8sQQ16s")  # magic, version, bytes of the pool, nonce
_MAGIC = b"KVFPOOL\0"
_VERSION = 1
_MADV_POPULATE_WRITE = 23
_AREA_BYTES = 2 << 20  # of one huge page
_SHORT_STEP_BYTES = 8 << 20  # about a millisecond
_LONG_STEP_BYTES = 32 << 20
_MAX_POOL_BYTES = 1 << 48  # of one mapping: more than any process can map
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SharedPool:
    """The memory of a worker's KV pool, allocated where peers can map it.

    `context()` is what a connector answers to `get_mem_pool_context`: inside it, a one-dimensional int8 `torch.zeros`
    on the CPU (the one allocation that our engine and vLLM make for all KV) is served from a shared mapping. Where it
    `is_optional`, memory that does not fit there is allocated as usual, and `refusal` says why.
    """

    def __init__(self, engine_id: str, fallback_folder: Path | None = None, *, is_optional: bool = False) -> None:
        self.refusal = ""
        self.allowed_folders = tuple(folder.absolute() for folder in (SHM_DIRECTORY, fallback_folder) if folder)
        """Where it may lie, and where peers' memory is mapped from: what lies elsewhere could be anybody's file."""
        self._engine_id = engine_id
        self._is_optional = is_optional
        self._parts: list[tuple[Segment, _Part]] = []

    def context(self) -> AbstractContextManager[Any]:
        """A context in which KV memory is shared. ConfigError from within `torch.zeros` when it must be, and is not."""
        from torch.overrides import TorchFunctionMode

        pool = self

        class SharedAllocation(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                num_bytes = _pool_bytes(func, args, kwargs or {})
                shared = None if num_bytes is None else pool._try_zeros(num_bytes)
                return func(*args, **(kwargs or {})) if shared is None else shared

        return SharedAllocation()

    def zeros(self, num_bytes: int) -> torch.Tensor:
        """A shared int8 tensor [num_bytes]. Blocks while the memory is made (about 0.3 s per GiB).

        In /dev/shm, or when that is too small in the fallback folder. ConfigError, with the remedy, when it fits
        neither.
        """
        import torch

        nonce = secrets.token_bytes(16)
        header = _HEADER.pack(_MAGIC, _VERSION, num_bytes, nonce)
        segment = self._create(PAGE_BYTES + num_bytes, header)
        self._parts.append((segment, _Part(segment.path, num_bytes, nonce, segment.descriptor, segment.inode)))
        return torch.frombuffer(segment.map, dtype=torch.int8, count=num_bytes, offset=PAGE_BYTES)

    def _try_zeros(self, num_bytes: int) -> torch.Tensor | None:
        try:
            return self.zeros(num_bytes)
        except ConfigError as error:
            if not self._is_optional:
                raise
            self.refusal = str(error)
            logger.warning("KV cannot be handed over through shared memory: %s", error)
            return None

    def place(self, address: int, num_bytes: int) -> tuple[_Part, int] | None:
        """The part these bytes lie in, and their offset there; None when they are not all in one."""
        for segment, part in self._parts:
            offset = address - segment.address - PAGE_BYTES
            if 0 <= offset <= part.num_bytes - num_bytes:
                return part, offset
        return None

    @property
    def folders(self) -> set[Path]:
        """Where the files lie."""
        return {Path(segment.path).parent for segment, _ in self._parts}

    def close(self) -> None:
        """Unlink the files. Tensors stay usable; peers that have mapped them see that the owner is gone."""
        for segment, _ in self._parts:
            segment.close()
        self._parts = []

    def _create(self, num_bytes: int, header: bytes) -> Segment:
        said = []
        for folder in self.allowed_folders:
            try:
                segment = Segment.create(engine_id=self._engine_id, num_bytes=num_bytes, header=header, folder=folder)
            except OSError as error:
                said.append(f"{folder}: {error}")
                continue
            if said:
                logger.warning("the KV pool lies in files under %s, which may be slow: %s", folder, said[0])
            return segment
        raise _no_room(num_bytes, said)

    def folder_for(self, num_bytes: int) -> Path:
        """Where a pool of so many bytes would lie. ConfigError, as `zeros` raises it, when it fits nowhere."""
        said, num_bytes = [], PAGE_BYTES + num_bytes
        for folder in self.allowed_folders:
            space = space_at(folder)
            if space.free_bytes >= num_bytes and space.is_writable:
                return folder
            said.append(f"{folder}: {f'{space.free_bytes} bytes are free' if space.is_writable else 'not writable'}")
        raise _no_room(num_bytes, said)


def _no_room(num_bytes: int, said: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"no room for a shared KV pool of {num_bytes} bytes ({'; '.join(said)}): give the container more shared "
        "memory (docker --shm-size), make the pool smaller, set kv_connector_extra_config.shm_dir to a folder on a "
        "disk, or choose another transport than shm"
    )


def _pool_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The size, if the call is torch.zeros of one dimension, int8, on the CPU, and not empty."""
    import torch

    if func is not torch.zeros or kwargs.get("dtype") is not torch.int8:
        return None
    shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], Sequence) else args
    device = kwargs.get("device")
    if len(shape) != 1 or not shape[0] or (device is not None and torch.device(device).type != "cpu"):
        return None
    return int(shape[0])


_Path = Annotated[str, msgspec.Meta(max_length=4095)]
_Inode = Annotated[int, msgspec.Meta(ge=0)]
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=_MAX_POOL_BYTES)]


class _Part(msgspec.Struct, frozen=True):
    """One mapping, as a peer needs it."""

    path: _Path
    num_bytes: Annotated[int, msgspec.Meta(ge=1, le=_MAX_POOL_BYTES)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    descriptor: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """A second path to it, which needs no name; empty: there is none."""
    inode: tuple[_Inode, _Inode] = (0, 0)


class _ShmBlob(msgspec.Struct, frozen=True, tag_field="transport", tag="shm 1"):
    boot_id: str
    parts: tuple[_Part, ...]
    regions: tuple[tuple[_Bytes, _Bytes, _Bytes], ...]
    """Part, offset in it, bytes."""
    process_ids: Annotated[str, msgspec.Meta(max_length=64)] = ""
    """What the maker's process id is of."""


class _ShmPeer(PeerHandle):
    def __init__(self, blob: _ShmBlob) -> None:
        super().__init__(f"shm:{blob.parts[0].path}", [num_bytes for _, _, num_bytes in blob.regions])
        self.blob = blob
        self.segments: list[Segment] = []
        self.bases = np.zeros(0, dtype=np.int64)
        self.mapped: list[npt.NDArray[np.bool_]] = []
        """Per segment and area of _AREA_BYTES, whether its pages are in our page table."""

    def map_pages(self, starts: Ints, lengths: Ints) -> None:
        """Map in few calls what is to be copied at these addresses: page by page, faults cost more than the copy."""
        for segment, part, mapped in zip(self.segments, self.blob.parts, self.mapped, strict=True):
            if mapped.all():
                continue
            size = PAGE_BYTES + part.num_bytes
            is_here = (starts >= segment.address) & (starts < segment.address + size)
            first = starts[is_here] - segment.address
            edges = np.zeros(len(mapped) + 1, dtype=np.int64)
            np.add.at(edges, first // _AREA_BYTES, 1)
            np.add.at(edges, (first + lengths[is_here] - 1) // _AREA_BYTES + 1, -1)
            missing = (np.cumsum(edges[:-1]) > 0) & ~mapped
            mapped |= missing
            for start, end in np.flatnonzero(np.diff(missing, prepend=False, append=False)).reshape(-1, 2).tolist():
                at, stop = start * _AREA_BYTES, min(end * _AREA_BYTES, size)
                # Not MAP_POPULATE: Python 3.11 maps with the GIL held. Old kernels refuse; then pages are touched late.
                _libc.madvise(segment.address + at, stop - at, _MADV_POPULATE_WRITE)


class ShmTransport(ThreadedTransport):
    """Same host only, CPU memory of a `SharedPool`."""

    capabilities = TransportCapabilities("shm", devices=("cpu",))
    uses_pool = True

    @classmethod
    def from_config(cls, setup: TransportSetup) -> ShmTransport:
        """Over the engine's pool. It has no settings of its own."""
        return cls(setup.pool or SharedPool(setup.engine_id))

    def __init__(self, pool: SharedPool) -> None:
        super().__init__()
        self._pool = pool
        self._boot_id = _BOOT_ID.read_text().strip()
        self._process_ids = process_ids()
        self._bases = np.zeros(0, dtype=np.int64)

    def peer_has_ended(self, peer: PeerHandle) -> bool:
        """The lock on its memory is free; of memory that could not be mapped: its process has let go of it."""
        assert isinstance(peer, _ShmPeer)
        return not peer.is_closing and (_has_ended(peer) if peer.segments else self._has_gone(peer.blob))

    def maker_has_ended(self, blob: bytes) -> bool:
        """Its process has let go of its memory. A name that is gone says nothing: others can take it away."""
        try:
            return self._has_gone(_decode(blob))
        except TransferError:
            return False

    def _has_gone(self, blob: _ShmBlob) -> bool:
        """Only of processes that both know by the same ids."""
        is_here = blob.boot_id == self._boot_id and blob.process_ids == self._process_ids != ""
        return is_here and any(has_let_go(part.descriptor, part.inode) for part in blob.parts)

    def _register(self) -> bytes:
        parts: list[_Part] = []
        places = []
        for number, region in enumerate(self.regions):
            place = self._pool.place(region.address, region.num_bytes)
            if place is None:
                why = self._pool.refusal or (
                    "the host did not allocate it within get_mem_pool_context(); choose another transport than shm"
                )
                raise ConfigError(f"KV region {number} ({region.num_bytes} bytes) does not lie in shared memory: {why}")
            part, offset = place
            if part not in parts:
                parts.append(part)
            places.append((parts.index(part), offset, region.num_bytes))
        self._bases = np.array([region.address for region in self.regions], dtype=np.int64)
        return msgspec.msgpack.encode(_ShmBlob(self._boot_id, tuple(parts), tuple(places), self._process_ids))

    def _parse(self, blob: bytes) -> PeerHandle:
        peer = _ShmPeer(_decode(blob))
        if peer.blob.boot_id != self._boot_id:
            raise TransferError("the peer is on another machine")
        folders = self._pool.allowed_folders
        for part in peer.blob.parts:
            if not is_segment_path(part.path, folders):
                raise TransferError(
                    f"the peer's KV pool {part.path} is no file of kvferry's in {' or '.join(map(str, folders))}: "
                    "set kv_connector_extra_config.shm_dir alike in both engines"
                )
        for part in peer.blob.parts:
            _attach(part).close()
        return peer

    def _open_peer(self, peer: PeerHandle) -> None:
        assert isinstance(peer, _ShmPeer)
        for part in peer.blob.parts:
            peer.segments.append(_attach(part))
            peer.mapped.append(np.zeros(-(-(PAGE_BYTES + part.num_bytes) // _AREA_BYTES), dtype=np.bool_))
        starts = [peer.segments[part].address + PAGE_BYTES + offset for part, offset, _ in peer.blob.regions]
        peer.bases = np.array(starts, dtype=np.int64)

    def _advance(self, transfer: Transfer) -> Step:
        peer = transfer.peer
        assert isinstance(peer, _ShmPeer)
        if transfer.state is None:
            self._check_alive(peer)
            transfer.state = self._copies(transfer, peer)
        num_bytes = next(transfer.state, None)
        if num_bytes is not None:
            self._landed(transfer, num_bytes)
            return Step.MOVED
        self._check_alive(peer)
        return Step.DONE

    def _copies(self, transfer: Transfer, peer: _ShmPeer) -> Iterator[int]:
        """All copies as addresses of this process; done step by step."""
        pieces = transfer.pieces
        from_, to = (peer.bases, self._bases) if transfer.op is TransferOp.READ else (self._bases, peer.bases)
        sources = from_[pieces.source_region] + pieces.source_offset
        destinations = to[pieces.destination_region] + pieces.destination_offset
        peer.map_pages(sources if transfer.op is TransferOp.READ else destinations, pieces.length)
        return copy_pieces(sources, destinations, pieces.length, self._step_bytes)

    def _step_bytes(self) -> int:
        """Short turns for those who wait; a long one asks a busy host for the GIL less often."""
        return _SHORT_STEP_BYTES if len(self._active) > 1 else _LONG_STEP_BYTES

    def _check_alive(self, peer: _ShmPeer) -> None:
        if _has_ended(peer):
            raise TransferError(f"the process that owned {peer.segments[0].path} has ended")

    def _close_peer(self, peer: PeerHandle, open_ops: set[TransferOp]) -> set[TransferOp]:
        assert isinstance(peer, _ShmPeer)
        segments, peer.segments = peer.segments, []
        for segment in segments:
            segment.close()
        return set()

    def _shut_down(self) -> None:
        """Peers are closed already; the pool is its owner's."""


_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _has_ended(peer: _ShmPeer) -> bool:
    return not all(segment.is_owner_alive() for segment in peer.segments)


def _attach(part: _Part) -> Segment:
    """By its name; one whose name somebody has taken away by its owner's descriptor."""
    header = _HEADER.pack(_MAGIC, _VERSION, part.num_bytes, part.nonce)
    is_unnamed = is_descriptor(part.descriptor) and not os.path.lexists(part.path)
    path = part.descriptor if is_unnamed else part.path
    try:
        return Segment.attach(path, PAGE_BYTES + part.num_bytes, header, what="KV pool", populate=False)
    except HostError as error:
        raise TransferError(str(error)) from error


def _decode(blob: bytes) -> _ShmBlob:
    """TransferError unless it is a blob of ours whose regions lie in its parts."""
    decoded = decode_blob(blob, _ShmBlob)
    if not decoded.parts:
        raise TransferError("the peer's shm blob names no KV pool")
    for part, offset, num_bytes in decoded.regions:
        if not 0 <= part < len(decoded.parts) or not 0 <= offset <= offset + num_bytes <= decoded.parts[part].num_bytes:
            raise TransferError("the peer's shm blob names a region outside its memory")
    return decoded
