"""A transport for tests, within one process: no thread, moves bytes only when polled, and fails in every way on demand.

    network = FakeNetwork(clock)
    here, there = FakeTransport(network), FakeTransport(network)
    here.faults.lands_late_s = 2.0    # closing a peer is no fence: bytes land two seconds later

What libraries do only once in a thousand runs (a late landing, half a write, a hang) it does every time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvferry.clock import Clock, SystemClock
from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.transports.transport import (
    Completion,
    PeerHandle,
    Pieces,
    Region,
    TransferOp,
    TransferStatus,
    TransportCapabilities,
    check_pieces,
)

__all__ = ["FakeNetwork", "FakeTransport", "TransportFaults"]

_PREFIX = b"fake transport "


@dataclass(slots=True)
class TransportFaults:
    """What goes wrong with transfers submitted, or peers closed, from now on."""

    delay_s: float = 0.0
    hangs: bool = False
    fails_after_bytes: int | None = None
    """That much is written, then the transfer fails."""
    ends_unknown: bool = False
    """Nothing is written yet when it ends; it lands with the next poll but one, if the peer is not closed."""
    lands_late_s: float | None = None
    """Transfers open when their peer is closed land that much later: closing is no fence."""
    miscounts_bytes: int = 0
    """Added to `bytes_moved` and to what completions say, per transfer."""


@dataclass
class FakeNetwork:
    """Who can reach whom, and the time."""

    clock: Clock = field(default_factory=SystemClock)
    ends: list[FakeTransport] = field(default_factory=list)


class _FakePeer(PeerHandle):
    def __init__(self, end: FakeTransport) -> None:
        super().__init__(end.name, [region.num_bytes for region in end.regions])
        self.end = end


@dataclass(slots=True, eq=False)
class _Transfer:
    ticket: int
    peer: _FakePeer
    op: TransferOp
    copies: list[tuple[int, int, int]]
    """(from, to, bytes)."""
    due_s: float
    faults: TransportFaults
    then: Callable[[], None] | None


class FakeTransport:
    """See `kvferry.p2p.transports.transport`. `kill` ends it as if its process had died."""

    def __init__(self, network: FakeNetwork, name: str = "fake") -> None:
        self.capabilities = TransportCapabilities(name, devices=("cpu",))
        self.bytes_moved = dict.fromkeys(TransferOp, 0)
        self.faults = TransportFaults()
        self.regions: tuple[Region, ...] = ()
        self.name = f"{name}-{len(network.ends)}"
        self.is_dead = False
        self._network = network
        self._open: list[_Transfer] = []
        self._late: list[_Transfer] = []
        self._completions: list[Completion] = []
        self._last_ticket = 0
        network.ends.append(self)

    def register(self, regions: Sequence[Region]) -> None:
        """Remembered."""
        if self.regions or not regions:
            raise ConfigError("a transport's memory is registered once, and is at least one region")
        self.regions = tuple(regions)

    def local_blob(self) -> bytes:
        """The place in the network."""
        return _PREFIX + str(self._network.ends.index(self)).encode()

    def why_unreachable(self, blob: bytes) -> str | None:
        """Whether it is somebody in this network."""
        number = blob.removeprefix(_PREFIX)
        is_ours = number != blob and number.isdigit() and int(number) < len(self._network.ends)
        return None if is_ours else "the blob is of no fake transport in this network"

    def connect(self, blob: bytes) -> PeerHandle:
        """At once."""
        if (why := self.why_unreachable(blob)) is not None:
            raise TransferError(why)
        return _FakePeer(self._network.ends[int(blob.removeprefix(_PREFIX))])

    def submit(self, peer: PeerHandle, op: TransferOp, pieces: Pieces, then: Callable[[], None] | None = None) -> int:
        """Due after the delay."""
        assert isinstance(peer, _FakePeer)
        self._check_open(peer)
        from_, to = (peer.end, self) if op is TransferOp.READ else (self, peer.end)
        check_pieces(pieces, *(np.array([region.num_bytes for region in end.regions]) for end in (from_, to)))
        sources = [from_.regions[r].address + o for r, o in _pairs(pieces.source_region, pieces.source_offset)]
        places = [to.regions[r].address + o for r, o in _pairs(pieces.destination_region, pieces.destination_offset)]
        faults = TransportFaults(**{name: getattr(self.faults, name) for name in TransportFaults.__slots__})
        copies = list(zip(sources, places, pieces.length.tolist(), strict=True))
        due_s = self._network.clock.now() + faults.delay_s
        self._open.append(_Transfer(self._ticket(), peer, op, copies, due_s, faults, then))
        return self._last_ticket

    def poll(self) -> list[Completion]:
        """Do all that is due."""
        now_s = self._network.clock.now()
        for transfer in [late for late in self._late if late.due_s <= now_s]:
            self._late.remove(transfer)
            self._copy(transfer)
        for transfer in [one for one in self._open if one.due_s <= now_s and not one.faults.hangs]:
            self._open.remove(transfer)
            self._completions.append(self._finish(transfer))
        completions, self._completions = self._completions, []
        return completions

    def close_peer(self, peer: PeerHandle) -> int:
        """A fence, unless `lands_late_s` is set."""
        assert isinstance(peer, _FakePeer)
        self._check_open(peer)
        peer.is_closing = True
        open_, late = ([one for one in group if one.peer is peer] for group in (self._open, self._late))
        is_fence = self.faults.lands_late_s is None or not (open_ or late)
        status = TransferStatus.FAILED if is_fence else TransferStatus.UNKNOWN
        self._open = [one for one in self._open if one.peer is not peer]
        self._late = [one for one in self._late if one.peer is not peer]
        self._completions += [Completion(one.ticket, status, "the connection was closed") for one in open_]
        if not is_fence:
            for one in (*open_, *late):
                one.due_s = self._network.clock.now() + (self.faults.lands_late_s or 0.0)
                self._late.append(one)
        ended = TransferStatus.OK if is_fence else TransferStatus.UNKNOWN
        self._completions.append(Completion(self._ticket(), ended, "" if is_fence else "bytes may still land"))
        return self._last_ticket

    def peer_has_ended(self, peer: PeerHandle) -> bool:
        """After `kill` or `close` of the other end, once nothing lands late any more."""
        assert isinstance(peer, _FakePeer)
        return peer.end.is_dead and not any(one.peer is peer for one in self._late)

    def maker_has_ended(self, blob: bytes) -> bool:
        """After `kill` or `close` of that end."""
        return self.why_unreachable(blob) is None and self._network.ends[int(blob.removeprefix(_PREFIX))].is_dead

    def kill(self) -> None:
        """The process has died: nothing of its own goes on, and whoever talks to it is told."""
        self.is_dead = True
        self._open, self._late, self._completions = [], [], []

    def close(self) -> None:
        """As `kill`."""
        self.kill()

    def _finish(self, transfer: _Transfer) -> Completion:
        faults = transfer.faults
        if transfer.peer.end.is_dead:
            return Completion(transfer.ticket, TransferStatus.FAILED, "the peer has ended")
        if faults.ends_unknown:
            self._late.append(transfer)
            return Completion(transfer.ticket, TransferStatus.UNKNOWN, "injected: it may still land")
        moved = self._copy(transfer) + faults.miscounts_bytes
        is_ok = faults.fails_after_bytes is None
        if is_ok and transfer.then is not None:
            transfer.then()
        status = TransferStatus.OK if is_ok else TransferStatus.FAILED
        return Completion(transfer.ticket, status, "" if is_ok else "injected: it failed half way", moved)

    def _copy(self, transfer: _Transfer) -> int:
        limit = transfer.faults.fails_after_bytes
        moved = 0
        for from_, to, length in transfer.copies:
            length = length if limit is None else min(length, limit - moved)
            ctypes.memmove(to, from_, length)
            moved += length
        self.bytes_moved[transfer.op] += moved + transfer.faults.miscounts_bytes
        return moved

    def _ticket(self) -> int:
        self._last_ticket += 1
        return self._last_ticket

    def _check_open(self, peer: PeerHandle) -> None:
        if self.is_dead or peer.is_closing:
            raise TransferError("the transport is closed" if self.is_dead else f"{peer} is closed")


def _pairs(regions: np.ndarray, offsets: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(regions.tolist(), offsets.tolist(), strict=True))
