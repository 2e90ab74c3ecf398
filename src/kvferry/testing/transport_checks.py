"""What every transport must pass. Inherit `TransportChecks` in a pytest module and say how to make one.

    class TestMine(TransportChecks):
        def make(self, region_bytes):
            memory = [numpy.zeros(n, numpy.uint8) for n in region_bytes]
            transport = MyTransport()
            transport.register([Region(m.ctypes.data, m.nbytes) for m in memory])
            return End(transport, memory)

Both ends live in this process; what needs other processes (kills, stops) is for each transport's own tests.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.transports.transport import (
    Completion,
    PeerHandle,
    Pieces,
    Region,
    TransferOp,
    TransferStatus,
    Transport,
)

Bytes = npt.NDArray[np.uint8]
READ, WRITE = TransferOp.READ, TransferOp.WRITE
_WAIT_S = 300.0


class End(NamedTuple):
    """A registered transport and the memory behind its regions."""

    transport: Transport
    memory: Sequence[Bytes]


def copies(rows: Sequence[tuple[int, int, int, int, int]]) -> Pieces:
    """From rows of (source region, offset, destination region, offset, length)."""
    return Pieces(*np.array(rows, dtype=np.int64).reshape(-1, 5).T.copy())


def wait_for(transport: Transport, *tickets: int, timeout_s: float = _WAIT_S) -> dict[int, Completion]:
    """Poll until these tickets have ended; AssertionError after `timeout_s`, or when a ticket ends twice."""
    ended: dict[int, Completion] = {}
    deadline_s = time.monotonic() + timeout_s
    while not set(tickets) <= ended.keys():
        assert time.monotonic() < deadline_s, f"tickets {sorted(set(tickets) - ended.keys())} did not end"
        for completion in transport.poll():
            assert completion.ticket not in ended, f"{completion} ended twice"
            ended[completion.ticket] = completion
        time.sleep(0.001)
    return ended


def random_copies(rng: random.Random, source_bytes: Sequence[int], destination_bytes: Sequence[int]) -> Pieces:
    """Pieces of all sizes at any offset, whose destinations do not overlap, in random order."""
    rows = []
    for region, num_bytes in enumerate(destination_bytes):
        at = rng.randrange(64)
        while at < num_bytes:
            from_ = rng.randrange(len(source_bytes))
            length = min(rng.choice((1, 7, 64, 4096, 100_000)), num_bytes - at, source_bytes[from_])
            rows.append((from_, rng.randrange(source_bytes[from_] - length + 1), region, at, length))
            at += length + rng.choice((0, 1, 5000))
    rng.shuffle(rows)
    return copies(rows)


def moved(pieces: Pieces, source: Sequence[Bytes], destination: Sequence[Bytes]) -> list[Bytes]:
    """What the destination must hold afterwards, by slices of numpy."""
    out = [memory.copy() for memory in destination]
    for from_, from_offset, to, to_offset, length in zip(*(array.tolist() for array in pieces), strict=True):
        out[to][to_offset : to_offset + length] = source[from_][from_offset : from_offset + length]
    return out


class TransportChecks(ABC):
    """Each test has two ends of its own, with two regions each, filled with different random bytes."""

    SEED = 20261121
    region_bytes = (300_001, 1 << 20)

    @abstractmethod
    def make(self, region_bytes: Sequence[int]) -> End:
        """A registered transport over new zeroed memory of these sizes."""

    def dispose(self, end: End) -> None:
        """Give back what `make` made."""
        end.transport.close()

    def setup_method(self) -> None:
        """Two ends and a connection from the first to the second."""
        self.here = self.make(self.region_bytes)
        self.there = self.make(self.region_bytes[::-1])
        self.extra: list[End] = []
        noise = np.random.default_rng(self.SEED)
        for memory in (*self.here.memory, *self.there.memory):
            memory[:] = noise.integers(0, 256, memory.size, dtype=np.uint8)
        self.peer = self.here.transport.connect(self.there.transport.local_blob())

    def teardown_method(self) -> None:
        """Dispose of all ends."""
        for end in (self.here, self.there, *self.extra):
            self.dispose(end)

    def run(self, op: TransferOp, pieces: Pieces, peer: PeerHandle | None = None) -> Completion:
        """Submit and wait."""
        ticket = self.here.transport.submit(self.peer if peer is None else peer, op, pieces)
        return wait_for(self.here.transport, ticket)[ticket]

    def _random(self, rng: random.Random, op: TransferOp) -> tuple[Pieces, End, End]:
        source, destination = (self.there, self.here) if op is READ else (self.here, self.there)
        sizes = [[memory.size for memory in end.memory] for end in (source, destination)]
        return random_copies(rng, *sizes), source, destination

    def test_any_pieces_land_where_they_should_and_nothing_else_changes(self) -> None:
        for round_ in range(6):
            op = (READ, WRITE)[round_ % 2]
            print("seed", self.SEED + round_)
            pieces, source, destination = self._random(random.Random(self.SEED + round_), op)
            before = [memory.copy() for memory in source.memory]
            expected = moved(pieces, source.memory, destination.memory)
            completion = self.run(op, pieces)
            assert completion.status is TransferStatus.OK, completion
            assert completion.num_bytes == pieces.length.sum()
            assert all(map(np.array_equal, destination.memory, expected))
            assert all(map(np.array_equal, source.memory, before))

    def test_counters_equal_the_bytes_of_the_pieces(self) -> None:
        expected = dict.fromkeys(TransferOp, 0)
        for round_, op in enumerate((READ, WRITE, READ)):
            pieces = self._random(random.Random(self.SEED + round_), op)[0]
            expected[op] += int(pieces.length.sum())
            self.run(op, pieces)
        assert self.here.transport.bytes_moved == expected
        assert self.there.transport.bytes_moved == dict.fromkeys(TransferOp, 0)

    def test_no_pieces_are_done(self) -> None:
        completion = self.run(READ, copies([]))
        assert (completion.status, completion.num_bytes) == (TransferStatus.OK, 0)

    def test_many_transfers_at_once_end_once_each(self) -> None:
        rng = random.Random(self.SEED)
        rows = [(0, 4096 * i, 1, 4096 * i, 4096) for i in range(64)]
        expected = self.here.memory[1].copy()
        expected[: 64 * 4096] = self.there.memory[0][: 64 * 4096]
        rng.shuffle(rows)
        tickets = [self.here.transport.submit(self.peer, READ, copies([row])) for row in rows]
        ended = wait_for(self.here.transport, *tickets)
        assert sorted(ended) == sorted(tickets)
        assert {completion.status for completion in ended.values()} == {TransferStatus.OK}
        assert np.array_equal(self.here.memory[1], expected)
        assert self.here.transport.poll() == []

    def test_two_peers_are_told_apart(self) -> None:
        other = self.make(self.region_bytes[::-1])
        self.extra.append(other)
        other.memory[0][:] = 77
        peer = self.here.transport.connect(other.transport.local_blob())
        expected = self.there.memory[0][:10].copy()
        self.run(READ, copies([(0, 0, 0, 0, 10)]))
        self.run(READ, copies([(0, 0, 0, 10, 10)]), peer)
        assert np.array_equal(self.here.memory[0][:10], expected)
        assert np.array_equal(self.here.memory[0][10:20], np.full(10, 77))

    def test_what_is_out_of_bounds_is_refused_before_anything_moves(self) -> None:
        before = [memory.copy() for memory in self.here.memory]
        good = (0, 0, 0, 0, 8)
        small, large = self.region_bytes
        bad_rows = [
            (2, 0, 0, 0, 8), (-1, 0, 0, 0, 8), (0, 0, 2, 0, 8), (0, 0, -1, 0, 8), (0, large - 7, 0, 0, 8),
            (0, -1, 0, 0, 8), (0, 0, 0, small - 7, 8), (0, 0, 0, -8, 8), (0, 0, 0, 0, 0), (0, 0, 0, 0, -8),
            (0, 0, 0, 0, large), (0, 0, 0, (1 << 63) - 1, 8), (0, (1 << 63) - 1, 0, 0, 8), (0, 0, 0, 0, (1 << 63) - 1),
        ]  # fmt: skip
        for row in bad_rows:
            _raises(self.here.transport.submit, self.peer, READ, copies([good, row]))
        assert all(map(np.array_equal, self.here.memory, before))
        assert self.run(READ, copies([good])).status is TransferStatus.OK

    def test_blobs_of_others_are_refused(self) -> None:
        blob = self.there.transport.local_blob()
        assert len(blob) <= 1 << 16
        assert self.here.transport.why_unreachable(blob) is None
        for wrong in (b"", b"\0" * 100, blob[:-3], b"\x93\x01\x02\x03"):
            assert self.here.transport.why_unreachable(wrong)
            _raises(self.here.transport.connect, wrong)

    def test_closing_a_peer_ends_everything_and_is_a_fence(self) -> None:
        size = self.region_bytes[0]
        tickets = [
            self.here.transport.submit(self.peer, READ, copies([(0, i, 0, i, 1) for i in range(0, size, 200)]))
            for _ in range(8)
        ]
        close = self.here.transport.close_peer(self.peer)
        ended = wait_for(self.here.transport, *tickets, close)
        assert ended[close].status is TransferStatus.OK, ended[close]
        assert list(ended)[-1] == close, "the close ticket ends last"
        assert {ended[ticket].status for ticket in tickets} <= {TransferStatus.OK, TransferStatus.FAILED}
        self.here.memory[0][:] = 5
        time.sleep(0.2)
        assert np.array_equal(self.here.memory[0], np.full(size, 5))

    def test_a_closed_peer_is_of_no_use_but_can_be_connected_anew(self) -> None:
        wait_for(self.here.transport, self.here.transport.close_peer(self.peer))
        _raises(self.here.transport.submit, self.peer, READ, copies([(0, 0, 0, 0, 8)]))
        _raises(self.here.transport.close_peer, self.peer)
        self.peer = self.here.transport.connect(self.there.transport.local_blob())
        assert self.run(READ, copies([(0, 0, 0, 0, 8)])).status is TransferStatus.OK
        assert np.array_equal(self.here.memory[0][:8], self.there.memory[0][:8])

    def test_one_peer_may_be_connected_twice_and_one_of_both_closed(self) -> None:
        """An engine that is known by two names."""
        twice = self.here.transport.connect(self.there.transport.local_blob())
        pieces = copies([(0, 0, 0, 0, 1000)])
        assert [self.run(READ, pieces, peer).status for peer in (twice, self.peer)] == [TransferStatus.OK] * 2
        close = self.here.transport.close_peer(twice)
        assert wait_for(self.here.transport, close)[close].status is TransferStatus.OK
        assert self.run(READ, pieces).status is TransferStatus.OK

    def test_a_peer_that_has_closed_fails_transfers(self) -> None:
        assert self.run(READ, copies([(0, 0, 0, 0, 8)])).status is TransferStatus.OK
        assert not self.here.transport.peer_has_ended(self.peer)
        self.dispose(self.there)
        deadline_s = time.monotonic() + _WAIT_S
        while (completion := self.run(READ, copies([(0, 0, 0, 0, 8)]))).status is TransferStatus.OK:
            assert time.monotonic() < deadline_s, "it is never noticed"
        assert completion.status is TransferStatus.FAILED
        assert completion.reason

    def test_closing_is_idempotent_and_final(self) -> None:
        self.here.transport.close()
        self.here.transport.close()
        _raises(self.here.transport.submit, self.peer, READ, copies([(0, 0, 0, 0, 8)]))

    def test_memory_is_registered_once(self) -> None:
        memory = self.here.memory[0]
        _raises(self.here.transport.register, [Region(memory.ctypes.data, memory.nbytes)], error=ConfigError)


def _raises(call: Callable[..., object], *arguments: object, error: type[Exception] = TransferError) -> None:
    try:
        call(*arguments)
    except error:
        return
    raise AssertionError(f"{error.__name__} was expected")
