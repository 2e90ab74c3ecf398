"""The seam between the P2P core and what moves bytes: one-sided READ and WRITE between two workers' KV memory.

A transport lives in a worker process. It is built once, knows the worker's memory as numbered regions, and reaches any
number of peers, each named by the blob that the peer's own transport made (blobs travel in the handshake).

    register(regions)      once, before anything else
    local_blob()           what a peer needs to connect to us
    connect(blob)          a handle; the work is done on the transport's thread, its failure fails the peer's tickets
    submit(peer, op, pieces, then) -> ticket
    poll()                 completions of tickets, each exactly once, in any order
    close_peer(peer)       -> ticket: its completion says whether anything of that peer's can still land
    close()

No call but `register` and `close` waits: copies run on a thread of the transport's own, with the GIL free. Calls come
from one thread at a time. Pieces are ranges of (region, offset, length) on both sides, in bytes, adjacent ones merged
by the planner; their destinations do not overlap. Every byte is checked against the region bounds of both sides
before anything moves.

How a ticket ends, and what that says about the memory that is written to (local for READ, remote for WRITE):

    OK        all bytes are there
    REJECTED  nothing was moved; the connection is as good as before
    FAILED    some bytes may be there, none will follow; do not use the connection again
    UNKNOWN   bytes may land until the peer is closed, or, where closing is no fence either, until a process has ended

A ticket whose peer hangs may never end: deadlines are the core's. It then closes the peer, which first ends all its
open tickets (FAILED, or UNKNOWN where that is no fence), then the close ticket itself: OK means that nothing of it
can land any more, UNKNOWN that it can, until `peer_has_ended`. Cancelling single tickets is not offered: no library has
a real abort (docs: a "successful" release was seen followed by 979 of 1,074 MB), so the fence is the connection.

`bytes_moved` counts what the transport itself has seen land, per operation; pieces of failed tickets included.

To write a transport: subclass `ThreadedTransport` (`kvferry.p2p.transports.threaded`), give it a `from_config`, pass
`kvferry.testing.TransportChecks`, and name it in an entry point of the group `kvferry.transports`
(docs/guides/extending.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kvferry.errors import TransferError

if TYPE_CHECKING:
    from kvferry.p2p.transports.shm import SharedPool

Ints = npt.NDArray[np.int64]


class TransferOp(Enum):
    """Who moves the bytes of a one-sided transfer."""

    READ = "read"  # remote -> local
    WRITE = "write"  # local -> remote


class TransferStatus(Enum):
    """How a ticket, or one rank's part of a job, ended; see above."""

    OK = "ok"
    REJECTED = "rejected"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Pieces(NamedTuple):
    """Copies of `length` bytes: five arrays of one length. Destinations do not overlap."""

    source_region: Ints
    source_offset: Ints
    destination_region: Ints
    destination_offset: Ints
    length: Ints


@dataclass(frozen=True, slots=True)
class Region:
    """One storage of the worker's KV pool; its number is its place in the list given to `register`."""

    address: int
    num_bytes: int
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Completion:
    """How a ticket of `submit` or `close_peer` ended, and when (of `time.perf_counter`).

    `num_bytes` of it are known to have landed.
    """

    ticket: int
    status: TransferStatus
    reason: str = ""
    num_bytes: int = 0
    ended_s: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class TransportCapabilities:
    """What a transport can do."""

    name: str
    devices: tuple[str, ...]


class PeerHandle:
    """One connected peer. Region sizes are the peer's; the rest belongs to the transport."""

    def __init__(self, name: str, region_bytes: Sequence[int]) -> None:
        self.name = name
        self.region_bytes = np.array(region_bytes, dtype=np.int64)
        self.is_closing = False
        self.unknown_ops: set[TransferOp] = set()

    def __repr__(self) -> str:
        return f"<peer {self.name}>"


@runtime_checkable
class Transport(Protocol):
    """See the module's text."""

    capabilities: TransportCapabilities
    bytes_moved: dict[TransferOp, int]

    def register(self, regions: Sequence[Region]) -> None:
        """Make the memory reachable for peers. May block. ConfigError when this transport cannot serve it."""
        ...

    def local_blob(self) -> bytes:
        """What peers pass to `connect`; at most 64 KiB."""
        ...

    def why_unreachable(self, blob: bytes) -> str | None:
        """Why the peer that made `blob` cannot be reached from here, as far as can be told at once; None: it can."""
        ...

    def connect(self, blob: bytes) -> PeerHandle:
        """A handle at once. TransferError when the blob is not one of this transport's, or unreachable."""
        ...

    def submit(self, peer: PeerHandle, op: TransferOp, pieces: Pieces, then: Callable[[], None] | None = None) -> int:
        """Start a transfer; returns its ticket. TransferError when pieces are out of bounds or the peer is closed.

        `then` is called, on the transport's thread, as soon as all bytes are there, before the ticket ends; quickly.
        """
        ...

    def poll(self) -> list[Completion]:
        """What ended since the last call."""
        ...

    def close_peer(self, peer: PeerHandle) -> int:
        """End all that is under way with this peer; returns a ticket. Once per peer."""
        ...

    def peer_has_ended(self, peer: PeerHandle) -> bool:
        """True when it is certain that the peer's process has ended, and nothing it or we moved can land any more.

        False when that cannot be told. May also be asked of a peer that `close_peer` left UNKNOWN.
        """
        ...

    def maker_has_ended(self, blob: bytes) -> bool:
        """`peer_has_ended` for the process that made this blob, where it could not be connected to. Opens files."""
        ...

    def close(self) -> None:
        """Close all peers, stop the thread, give the memory back. Open tickets get no completion. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class TransportSetup:
    """What a worker's transport may need to know before it is given memory."""

    engine_id: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The transport's own settings, as the user wrote them: unknown keys and wrong values are the transport's to name
    (`kvferry.config.parse_settings` does)."""
    where: str = ""
    """The place of `config` in the user's configuration, for messages."""
    host: str = "127.0.0.1"
    """The address on which the engine listens for peers: listen on the same one."""
    advertised_host: str = "127.0.0.1"
    """The address or name under which peers reach this machine."""
    pool: SharedPool | None = None
    """What KV memory is allocated in, so that processes of this machine can map it; None unless the factory's
    `uses_pool` is true, or the setting `transport` is `auto`."""


class TransportFactory(Protocol):
    """What a class named in an entry point of `kvferry.transports` must offer: `from_config`. The rest is optional.

    The entry point's name, the transport's `capabilities.name` and the setting `transport` are one word.

    uses_pool     class attribute; True: KV memory is allocated in a `SharedPool`, as for shared memory
    is_for_auto   class attribute; True: `transport: "auto"` tries it too, after kvferry's own
    check(config, where)   classmethod; ConfigError when such a transport cannot be had on this machine or `config` is
                           wrong. Opens nothing; asked before every start and by `kvferry doctor`
    """

    def from_config(self, setup: TransportSetup) -> Transport:
        """Make the transport (classmethod); `register` follows. ConfigError: settings, or what is missing here."""
        ...


def check_pieces(pieces: Pieces, source_bytes: Ints, destination_bytes: Ints) -> int:
    """Number of bytes the pieces move. TransferError unless all lie within regions of these sizes."""
    arrays = (
        pieces.source_region,
        pieces.source_offset,
        pieces.destination_region,
        pieces.destination_offset,
        pieces.length,
    )
    if any(array.dtype != np.int64 or array.shape != pieces.length.shape for array in arrays):
        raise TransferError("pieces must be five int64 arrays of one length")
    if pieces.length.size and pieces.length.min() < 1:
        raise TransferError(f"a piece of {pieces.length.min()} bytes")
    _check_side("source", pieces.source_region, pieces.source_offset, pieces.length, source_bytes)
    _check_side("destination", pieces.destination_region, pieces.destination_offset, pieces.length, destination_bytes)
    return int(pieces.length.sum())


def _check_side(side: str, region: Ints, offset: Ints, length: Ints, region_bytes: Ints) -> None:
    is_bad = (region < 0) | (region >= len(region_bytes))
    if not is_bad.any():
        is_bad = (offset < 0) | (offset > region_bytes[region] - length)
    if is_bad.any():
        first = int(is_bad.argmax())
        raise TransferError(
            f"piece {first} is outside the {side} memory: region {region[first]}, offset {offset[first]}, "
            f"{length[first]} bytes; there are {len(region_bytes)} region(s) of {region_bytes.tolist()[:8]} bytes"
        )
