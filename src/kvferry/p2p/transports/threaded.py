"""The part all transports share: one thread that owns the native library, commands in, completions out.

A leaf fills in what is done per peer and per piece of work. Transfers take turns, one bounded step each, so that a
small one need not wait for a large one, and closing a peer takes effect between two steps. Where closing is no fence
for what is being written, that gets a while to end by itself first: of an honest peer whose control link broke, all
does.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import msgspec
import numpy as np

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

logger = logging.getLogger(__name__)

B = TypeVar("B", bound=msgspec.Struct)
_IDLE_S = 0.0005
_JOIN_S = 5.0
_CLOSED = "the connection was closed"
_REST_S = 0.2  # after a failure that the next turn would repeat


def decode_blob(blob: bytes, kind: type[B]) -> B:
    """A peer's blob, of a struct whose tag names transport and version. TransferError when it is another's."""
    try:
        return msgspec.msgpack.decode(blob, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TransferError(f"the peer's blob is none of {kind.__struct_config__.tag!r}: {error}") from error


class Step(Enum):
    """What one turn of a transfer did."""

    MOVED = "moved"  # there is more to do at once
    WAITING = "waiting"  # look again soon
    DONE = "done"


@dataclass(slots=True, eq=False)
class Transfer:
    """A ticket under way. `moved_bytes` is kept by the leaf, as is `state`."""

    ticket: int
    peer: PeerHandle
    op: TransferOp
    pieces: Pieces
    num_bytes: int
    moved_bytes: int = 0
    state: Any = None
    then: Callable[[], None] | None = None
    is_halted: bool = False
    """Its peer is being closed: nothing more of it starts."""


class ThreadedTransport(ABC):
    """See `kvferry.p2p.transports.transport` for what the public methods mean."""

    capabilities: TransportCapabilities
    serve_interval_s: float | None = None
    """How often `_serve` must be called while nothing of our own is under way; None: not at all."""
    drain_s: float = 0.0
    """How long writes under way may take to end when their peer is closed; 0 where closing is a fence for them."""

    def __init__(self) -> None:
        self.bytes_moved = dict.fromkeys(TransferOp, 0)
        self.regions: tuple[Region, ...] = ()
        self._region_bytes = np.zeros(0, dtype=np.int64)
        self._blob = b""
        self._lock = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._completions: list[Completion] = []
        self._active: list[Transfer] = []
        self._broken: dict[PeerHandle, str] = {}
        self._peers: list[PeerHandle] = []
        self._draining: dict[PeerHandle, tuple[int, float]] = {}
        self._last_ticket = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._main, name=f"kvferry-{self.capabilities.name}", daemon=True)

    # ---- for the owner ----------------------------------------------------------------------------------------

    def register(self, regions: Sequence[Region]) -> None:
        """Once. Starts the thread."""
        if self.regions or not regions:
            raise ConfigError("a transport's memory is registered once, and is at least one region")
        for region in regions:
            if region.device.partition(":")[0] not in self.capabilities.devices:
                raise ConfigError(
                    f"the {self.capabilities.name} transport moves memory of {', '.join(self.capabilities.devices)}, "
                    f"not of {region.device}"
                )
        self.regions = tuple(regions)
        self._region_bytes = np.array([region.num_bytes for region in regions], dtype=np.int64)
        self._blob = self._register()
        self._thread.start()

    def local_blob(self) -> bytes:
        """As the leaf made it."""
        return self._blob

    def why_unreachable(self, blob: bytes) -> str | None:
        """As the leaf says."""
        try:
            self._parse(blob)
        except TransferError as error:
            return str(error)
        return None

    def connect(self, blob: bytes) -> PeerHandle:
        """A handle; the peer is opened on the thread."""
        peer = self._parse(blob)
        self._command(lambda: self._open(peer))
        return peer

    def submit(self, peer: PeerHandle, op: TransferOp, pieces: Pieces, then: Callable[[], None] | None = None) -> int:
        """Check and queue."""
        if peer.is_closing:
            raise TransferError(f"{peer} is closed")
        sizes = (peer.region_bytes, self._region_bytes)
        num_bytes = check_pieces(pieces, *(sizes if op is TransferOp.READ else sizes[::-1]))
        transfer = Transfer(self._next_ticket(), peer, op, pieces, num_bytes, then=then)
        self._command(lambda: self._active.append(transfer))
        return transfer.ticket

    def poll(self) -> list[Completion]:
        """What ended."""
        with self._lock:
            completions, self._completions = self._completions, []
        return completions

    def close_peer(self, peer: PeerHandle) -> int:
        """Queued like a transfer, but goes before all of them."""
        if peer.is_closing:
            raise TransferError(f"{peer} is closed")
        peer.is_closing = True
        ticket = self._next_ticket()
        self._command(lambda: self._close(peer, ticket))
        return ticket

    def peer_has_ended(self, peer: PeerHandle) -> bool:
        """Cannot be told, unless the leaf knows better."""
        return False

    def maker_has_ended(self, blob: bytes) -> bool:
        """Cannot be told, unless the leaf knows better."""
        return False

    def close(self) -> None:
        """Waits (bounded) for the step that runs."""
        with self._lock:
            self._is_closing = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                logger.warning("the %s transport's thread is stuck in a copy; left behind", self.capabilities.name)

    # ---- for leaves -------------------------------------------------------------------------------------------

    @abstractmethod
    def _register(self) -> bytes:
        """Make `self.regions` reachable; returns the blob. Owner's thread, before the own one starts."""

    @abstractmethod
    def _parse(self, blob: bytes) -> PeerHandle:
        """A handle, not yet open. TransferError: not a blob of ours, or out of reach as far as can be told at once."""

    @abstractmethod
    def _open_peer(self, peer: PeerHandle) -> None:
        """Connect. TransferError fails all the peer's tickets."""

    @abstractmethod
    def _advance(self, transfer: Transfer) -> Step:
        """Do one bounded step. TransferError: it failed, and nothing of it lands any more."""

    @abstractmethod
    def _close_peer(self, peer: PeerHandle, open_ops: set[TransferOp]) -> set[TransferOp]:
        """Disconnect, also where opening failed half way. Returns those of `open_ops` of which bytes may still land."""

    def _halt(self, transfer: Transfer) -> None:
        """`_advance` starts nothing more of it, and says DONE when nothing of it is under way."""
        return

    def _is_dead(self, peer: PeerHandle) -> bool:
        """Whether it is certain that its process has ended; what is written to it will not end."""
        return False

    def _serve(self) -> None:
        """Whatever the library needs done for peers."""
        return

    @abstractmethod
    def _shut_down(self) -> None:
        """Give everything back; the last thing the thread does."""

    def _landed(self, transfer: Transfer, num_bytes: int) -> None:
        """Count."""
        transfer.moved_bytes += num_bytes
        self.bytes_moved[transfer.op] += num_bytes

    # ---- the thread -------------------------------------------------------------------------------------------

    def _next_ticket(self) -> int:
        self._last_ticket += 1
        return self._last_ticket

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closing:
                raise TransferError(f"the {self.capabilities.name} transport is closed")
            self._commands.append(command)
            self._lock.notify()

    def _has_news(self) -> bool:
        return bool(self._commands) or self._is_closing

    def _main(self) -> None:
        is_waiting = False
        while True:
            with self._lock:
                if is_waiting or not self._active:
                    self._lock.wait_for(self._has_news, _IDLE_S if self._active else self.serve_interval_s)
                if self._is_closing:
                    break
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            self._serve_peers()
            steps = {self._turn(transfer) for transfer in list(self._active)}
            is_waiting = steps <= {Step.WAITING}
            self._close_drained()
        for peer in list(self._peers):
            self._close_now(peer, 0)
        self._shut_down()

    def _serve_peers(self) -> None:
        try:
            self._serve()
        except Exception as error:  # a thread's main: tickets must end, and peers still be closed
            logger.exception("%s: serving peers", self.capabilities.name)
            for transfer in list(self._active):
                self._give_up(transfer, error)
            time.sleep(_REST_S)

    def _give_up(self, transfer: Transfer, error: Exception) -> None:
        """It ends, and nobody knows what of it goes on."""
        transfer.peer.unknown_ops.add(transfer.op)
        self._end(transfer, TransferStatus.UNKNOWN, f"{type(error).__name__}: {error}")

    def _turn(self, transfer: Transfer) -> Step:
        """One step of one transfer, and its end if that was the last."""
        try:
            self._check_open(transfer.peer)
            step = self._advance(transfer)
        except TransferError as error:
            is_unknown = transfer.op in transfer.peer.unknown_ops
            self._end(transfer, TransferStatus.UNKNOWN if is_unknown else TransferStatus.FAILED, str(error))
            return Step.DONE
        except Exception as error:  # a thread's main: what a library may raise is not known, nor what it left running
            logger.exception("%s: transfer %d", self.capabilities.name, transfer.ticket)
            self._give_up(transfer, error)
            return Step.DONE
        if step is Step.DONE and transfer.is_halted:
            is_unknown = transfer.op in transfer.peer.unknown_ops
            self._end(transfer, TransferStatus.UNKNOWN if is_unknown else TransferStatus.FAILED, _CLOSED)
        elif step is Step.DONE:
            if transfer.then is not None:
                transfer.then()
            self._end(transfer, TransferStatus.OK, "")
        return step

    def _check_open(self, peer: PeerHandle) -> None:
        if peer in self._broken:
            raise TransferError(self._broken[peer])

    def _end(self, transfer: Transfer, status: TransferStatus, reason: str) -> None:
        self._active.remove(transfer)
        self._complete(Completion(transfer.ticket, status, reason, transfer.moved_bytes))

    def _complete(self, completion: Completion) -> None:
        with self._lock:
            self._completions.append(completion)

    def _open(self, peer: PeerHandle) -> None:
        self._peers.append(peer)
        self._try_open(peer)

    def _try_open(self, peer: PeerHandle) -> None:
        """Open it, or note why all its tickets fail."""
        try:
            self._open_peer(peer)
        except TransferError as error:
            self._broken[peer] = str(error)
        except Exception as error:  # a thread's main
            logger.exception("%s: opening %r", self.capabilities.name, peer)
            self._broken[peer] = f"{type(error).__name__}: {error}"

    def _close(self, peer: PeerHandle, ticket: int) -> None:
        """Now; or, where something is being written, when what is under way has ended."""
        transfers = [transfer for transfer in self._active if transfer.peer is peer]
        is_writing = any(transfer.op is TransferOp.WRITE for transfer in transfers)
        if not self.drain_s or not is_writing or peer in self._broken:
            self._close_now(peer, ticket)
            return
        for transfer in transfers:
            transfer.is_halted = True
            self._halt(transfer)
        self._draining[peer] = ticket, time.monotonic() + self.drain_s

    def _close_drained(self) -> None:
        if not self._draining:
            return
        unfinished = {transfer.peer for transfer in self._active if transfer.is_halted}
        for peer, (ticket, until_s) in list(self._draining.items()):
            if peer not in unfinished or time.monotonic() >= until_s or self._is_dead(peer):
                del self._draining[peer]
                self._close_now(peer, ticket)

    def _close_now(self, peer: PeerHandle, ticket: int) -> None:
        """Open transfers first, then the close ticket."""
        transfers = [transfer for transfer in self._active if transfer.peer is peer]
        is_broken = self._broken.pop(peer, None) is not None
        ops = peer.unknown_ops | (set() if is_broken else {transfer.op for transfer in transfers})
        reason = "may still land: closing the connection is no fence for it"
        try:
            landing = self._close_peer(peer, ops)
        except Exception as error:  # a thread's main
            logger.exception("%s: closing %r", self.capabilities.name, peer)
            landing, reason = ops, f"may still land: {type(error).__name__}: {error}"
        self._peers.remove(peer)
        peer.unknown_ops = landing
        for transfer in transfers:
            status = TransferStatus.UNKNOWN if transfer.op in landing else TransferStatus.FAILED
            self._end(transfer, status, _CLOSED)
        status = TransferStatus.UNKNOWN if landing else TransferStatus.OK
        names = " and ".join(sorted(op.value for op in landing))
        self._complete(Completion(ticket, status, f"{names} {reason}" if landing else ""))
