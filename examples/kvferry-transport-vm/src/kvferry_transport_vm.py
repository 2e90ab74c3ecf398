"""A transport for kvferry, "vm": the kernel copies between two processes of one machine, and no memory is shared.

It serves where `/dev/shm` is too small for the KV pool. Both processes must run as one user and know each other by the
same process ids, and the system must let one look into the other (containers need `--cap-add SYS_PTRACE`).

Every copy is made by a system call of this process, for READ and for WRITE, and is over when the call returns. So once
the thread has stopped copying for a peer, nothing of it lands any more: closing is a real fence. That a peer still owns
the addresses it named is told by its life sign, a page in `/dev/shm` on which it holds a lock for life; it is looked at
before and after every transfer.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from kvferry.config import parse_settings
from kvferry.errors import ConfigError, HostError, TransferError
from kvferry.kv.segment import PAGE_BYTES, SHM_DIRECTORY, Segment, is_segment_path, process_ids
from kvferry.p2p.transports.threaded import Step, ThreadedTransport, Transfer, decode_blob
from kvferry.p2p.transports.transport import (
    Ints,
    PeerHandle,
    Pieces,
    TransferOp,
    TransportCapabilities,
    TransportSetup,
)

MAX_VECTORS = 1024  # of one system call (IOV_MAX)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]

_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class VmSettings:
    """`"transport_config": {"vm": {...}}`"""

    step_bytes: int = field(default=8 << 20, metadata={"minimum": 4096})  # copied in one turn; others wait so long


class _Region(msgspec.Struct, frozen=True):
    address: _Number
    num_bytes: _Number


class _Blob(msgspec.Struct, frozen=True, tag_field="transport", tag="vm 1"):
    """What peers must know. The tag names transport and version: a blob of another kind cannot be decoded."""

    boot_id: str
    process_ids: str  # the namespace of the number that follows
    process: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    regions: tuple[_Region, ...]
    life: str
    nonce: bytes


class _VmPeer(PeerHandle):
    def __init__(self, blob: _Blob) -> None:
        super().__init__(f"process {blob.process}", [region.num_bytes for region in blob.regions])
        self.blob = blob
        self.addresses = np.array([region.address for region in blob.regions], dtype=np.int64)
        self.life: Segment | None = None

    def check_alive(self) -> None:
        """TransferError when its memory may not be its memory any more."""
        if self.life is None or not self.life.is_owner_alive():
            raise TransferError(f"the transport of {self.name} has ended")


class VmTransport(ThreadedTransport):
    """Same machine, CPU memory of any kind."""

    capabilities = TransportCapabilities("vm", devices=("cpu",))

    @classmethod
    def from_config(cls, setup: TransportSetup) -> VmTransport:
        """As `VmSettings` says."""
        settings = parse_settings(VmSettings, setup.config, setup.where)
        return cls(setup.engine_id, settings.step_bytes)

    @classmethod
    def check(cls, config: Mapping[str, Any], where: str) -> None:
        """ConfigError for wrong settings, and where the kernel does not copy between processes at all."""
        parse_settings(VmSettings, config, where)
        source, copy = ctypes.c_int64(7), ctypes.c_int64(0)
        try:
            _copy(
                TransferOp.READ,
                os.getpid(),
                *(np.array([n]) for n in (ctypes.addressof(copy), ctypes.addressof(source), 8)),
            )
        except TransferError as error:
            raise ConfigError(f"{where}: this system does not copy between processes ({error})") from error

    def __init__(self, engine_id: str, step_bytes: int = 8 << 20) -> None:
        super().__init__()
        self._engine_id = engine_id
        self._step_bytes = step_bytes
        self._boot_id = _BOOT_ID.read_text().strip()
        self._process_ids = process_ids()
        self._addresses = np.zeros(0, dtype=np.int64)
        self._life: Segment | None = None

    def peer_has_ended(self, peer: PeerHandle) -> bool:
        """The lock on its life sign is free."""
        assert isinstance(peer, _VmPeer)
        return not peer.is_closing and peer.life is not None and not peer.life.is_owner_alive()

    # ---- what ThreadedTransport asks of a leaf ---------------------------------------------------------------------

    def _register(self) -> bytes:
        nonce = secrets.token_bytes(16)
        try:
            self._life = Segment.create(
                engine_id=self._engine_id, num_bytes=PAGE_BYTES, header=nonce, folder=SHM_DIRECTORY
            )
        except OSError as error:
            raise ConfigError(f"the vm transport cannot make its life sign in {SHM_DIRECTORY}: {error}") from error
        self._addresses = np.array([region.address for region in self.regions], dtype=np.int64)
        regions = tuple(_Region(region.address, region.num_bytes) for region in self.regions)
        return msgspec.msgpack.encode(
            _Blob(self._boot_id, self._process_ids, os.getpid(), regions, self._life.path, nonce)
        )

    def _parse(self, blob: bytes) -> PeerHandle:
        peer = _VmPeer(decode_blob(blob, _Blob))
        if peer.blob.boot_id != self._boot_id:
            raise TransferError("the peer is on another machine")
        if not peer.blob.process_ids == self._process_ids != "":  # its number could be somebody else's here
            raise TransferError("the peer is in a container with process ids of its own")
        if not is_segment_path(peer.blob.life):  # it could be anybody's file
            raise TransferError(f"the peer's life sign {peer.blob.life} is no file of kvferry's in {SHM_DIRECTORY}")
        _attach(peer.blob).close()
        return peer

    def _open_peer(self, peer: PeerHandle) -> None:
        assert isinstance(peer, _VmPeer)
        peer.life = _attach(peer.blob)

    def _advance(self, transfer: Transfer) -> Step:
        peer = transfer.peer
        assert isinstance(peer, _VmPeer)
        if transfer.state is None:
            peer.check_alive()
            transfer.state = _steps(transfer.pieces, self._step_bytes)
        step = next(transfer.state, None)
        if step is None:
            peer.check_alive()
            return Step.DONE
        source, destination = step[:2], step[2:4]
        here, there = (destination, source) if transfer.op is TransferOp.READ else (source, destination)
        local = self._addresses[here[0]] + here[1]
        _copy(transfer.op, peer.blob.process, local, peer.addresses[there[0]] + there[1], step.length)
        self._landed(transfer, int(step.length.sum()))
        return Step.MOVED

    def _close_peer(self, peer: PeerHandle, open_ops: set[TransferOp]) -> set[TransferOp]:
        assert isinstance(peer, _VmPeer)
        if peer.life is not None:
            peer.life.close()
            peer.life = None
        return set()  # nothing is under way between two steps

    def _shut_down(self) -> None:
        if self._life is not None:
            self._life.close()


def _attach(blob: _Blob) -> Segment:
    try:
        return Segment.attach(blob.life, PAGE_BYTES, blob.nonce, what="life sign", populate=False)
    except HostError as error:
        raise TransferError(str(error)) from error


def _steps(pieces: Pieces, step_bytes: int) -> Iterator[Pieces]:
    """The pieces in parts of at most `step_bytes` and MAX_VECTORS; a longer piece is cut."""
    cuts = -(-pieces.length // step_bytes)
    of = np.repeat(np.arange(len(cuts)), cuts)
    done = (np.arange(len(of)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * step_bytes
    lengths = np.minimum(pieces.length[of] - done, step_bytes)
    sources, destinations = pieces.source_offset[of] + done, pieces.destination_offset[of] + done
    cut = Pieces(pieces.source_region[of], sources, pieces.destination_region[of], destinations, lengths)
    start = 0
    while start < len(lengths):
        ends = np.cumsum(lengths[start : start + MAX_VECTORS])
        stop = start + max(1, int(np.searchsorted(ends, step_bytes, side="right")))
        yield Pieces(*(array[start:stop] for array in cut))
        start = stop


def _copy(op: TransferOp, process: int, local: Ints, remote: Ints, lengths: Ints) -> None:
    """One system call, with the interpreter lock free. TransferError when it did not copy everything."""
    ours, theirs = (np.stack([addresses, lengths], axis=1).astype(np.uint64) for addresses in (local, remote))
    call = _libc.process_vm_readv if op is TransferOp.READ else _libc.process_vm_writev
    copied = call(process, ours.ctypes.data, len(ours), theirs.ctypes.data, len(theirs), 0)
    if copied < 0:
        raise TransferError(f"process {process}: {os.strerror(ctypes.get_errno())}")
    if copied != lengths.sum():
        raise TransferError(f"process {process}: {copied} of {lengths.sum()} bytes were copied")
