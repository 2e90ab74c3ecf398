"""The real NIXL library over UCX, between real processes. Runs in an environment of its own: `make test-native`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from tests.patience import wait_until

from kvferry.errors import ConfigError
from kvferry.p2p.transports.nixl import NixlTransport
from kvferry.p2p.transports.transport import PeerHandle, Region, TransferOp, TransferStatus
from kvferry.testing.transport_checks import End, TransportChecks, copies, wait_for

READ, WRITE = TransferOp.READ, TransferOp.WRITE
SIZE = 64 << 20

OWNER = """
import sys, numpy
from kvferry.p2p.transports.nixl import NixlTransport
from kvferry.p2p.transports.transport import Region
memory = (numpy.arange(int(sys.argv[1])) % 251).astype(numpy.uint8)
transport = NixlTransport("owner")
transport.register([Region(memory.ctypes.data, memory.nbytes)])
print("blob", transport.local_blob().hex(), flush=True)
for line in sys.stdin:
    print("count", int((memory == int(line)).sum()), flush=True)
transport.close()
"""


def nixl_end(region_bytes: Sequence[int]) -> End:
    memory = [np.zeros(num_bytes, np.uint8) for num_bytes in region_bytes]
    transport = NixlTransport("test")
    transport.register([Region(array.ctypes.data, array.nbytes) for array in memory])
    return End(transport, memory)


class TestNixl(TransportChecks):
    def make(self, region_bytes: Sequence[int]) -> End:
        return nixl_end(region_bytes)


class Owner:
    """Another process; byte i of its memory is i % 251."""

    def __init__(self, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(SIZE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        self.blob = bytes.fromhex(self.answer("blob"))

    def answer(self, tag: str) -> str:
        """NIXL logs on stdout too."""
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith(tag):
            assert line, "the owner has died"
        return line.split()[1]

    def count(self, value: int) -> int:
        """How many of its bytes have this value."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{value}\n")
        self.process.stdin.flush()
        return int(self.answer("count"))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start_owner() -> Iterator[Callable[..., Owner]]:
    owners: list[Owner] = []

    def start(**environment: str) -> Owner:
        owners.append(Owner(**environment))
        return owners[-1]

    yield start
    for owner in owners:
        owner.kill()


@pytest.fixture
def here() -> Iterator[End]:
    end = nixl_end([SIZE])
    yield end
    end.transport.close()


EXPECTED = (np.arange(SIZE) % 251).astype(np.uint8)
WHOLE = [(0, at, 0, at, 1 << 20) for at in range(0, SIZE, 1 << 20)]


def test_another_process_is_read_and_written(start_owner, here: End) -> None:
    owner = start_owner()
    peer = here.transport.connect(owner.blob)
    ticket = here.transport.submit(peer, READ, copies(WHOLE))
    completion = wait_for(here.transport, ticket)[ticket]
    assert (completion.status, completion.num_bytes) == (TransferStatus.OK, SIZE)
    assert np.array_equal(here.memory[0], EXPECTED)
    here.memory[0][:1000] = 255
    ticket = here.transport.submit(peer, WRITE, copies([(0, 0, 0, 5000, 1000)]))
    assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
    assert owner.count(255) == 1000
    assert here.transport.bytes_moved == {READ: SIZE, WRITE: 1000}


@pytest.mark.parametrize("op", TransferOp)
def test_a_killed_peer_fails_and_the_next_one_works(start_owner, here: End, op: TransferOp) -> None:
    owner = start_owner()
    peer = here.transport.connect(owner.blob)
    first = here.transport.submit(peer, op, copies(WHOLE))
    assert wait_for(here.transport, first)[first].status is TransferStatus.OK
    owner.kill()
    ticket = here.transport.submit(peer, op, copies(WHOLE))
    completion = wait_for(here.transport, ticket)[ticket]
    assert completion.status is TransferStatus.FAILED, completion
    assert "lost the peer" in completion.reason
    close = here.transport.close_peer(peer)
    assert wait_for(here.transport, close)[close].status is TransferStatus.OK
    _read_all(start_owner(), here)


def test_killed_in_mid_transfer_fails(start_owner, here: End) -> None:
    owner = start_owner()
    peer = here.transport.connect(owner.blob)
    small = copies([(0, at, 0, at, 16 << 10) for at in range(0, SIZE, 16 << 10)])
    tickets = [here.transport.submit(peer, READ, small) for _ in range(100)]
    while not here.transport.bytes_moved[READ]:
        time.sleep(0.001)
    owner.kill()
    ended = wait_for(here.transport, *tickets)
    assert ended[tickets[-1]].status is TransferStatus.FAILED


@pytest.mark.parametrize("op", TransferOp)
def test_a_hung_peer_is_closed_and_others_go_on(start_owner, monkeypatch: pytest.MonkeyPatch, op: TransferOp) -> None:
    """Over TCP alone, as between hosts: with CMA a stopped process can still be read."""
    monkeypatch.setattr(NixlTransport, "drain_s", 2.0)
    monkeypatch.setenv("UCX_TLS", "tcp")
    here = nixl_end([SIZE])
    try:
        hung, other = start_owner(), start_owner()
        peers = [here.transport.connect(owner.blob) for owner in (hung, other)]
        for peer in peers:
            ticket = here.transport.submit(peer, READ, copies([(0, 0, 0, 0, 64)]))
            assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
        hung.signal(signal.SIGSTOP)
        ticket = here.transport.submit(peers[0], op, copies(WHOLE))
        wait_until(
            "it has begun",
            lambda: any(each.state and each.state.open for each in list(here.transport._active)),
        )
        time.sleep(1)
        assert here.transport.poll() == [], "no end can be known"
        close = here.transport.close_peer(peers[0])
        ended = wait_for(here.transport, ticket, close)
        is_read = op is READ
        assert ended[ticket].status is (TransferStatus.FAILED if is_read else TransferStatus.UNKNOWN)
        assert ended[close].status is (TransferStatus.OK if is_read else TransferStatus.UNKNOWN)
        here.memory[0][:] = 253
        hung.signal(signal.SIGCONT)
        time.sleep(2)
        assert (here.memory[0] == 253).all(), "bytes landed behind the fence"
        ticket = here.transport.submit(peers[1], READ, copies(WHOLE))
        assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
        assert np.array_equal(here.memory[0], EXPECTED)
        if not is_read:
            assert not here.transport.peer_has_ended(peers[0])
            hung.kill()
            wait_until("the peer has ended", lambda: here.transport.peer_has_ended(peers[0]))
            assert peers[0].life._is_closed
            assert here.transport.peer_has_ended(peers[0])
    finally:
        here.transport.close()


def test_writes_under_way_end_before_their_peer_is_closed(start_owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the peer goes on in time, so that no block of its need stay out of use, and nothing more is begun."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    here = nixl_end([SIZE])
    try:
        owner = start_owner()
        peer = here.transport.connect(owner.blob)
        ticket = here.transport.submit(peer, READ, copies([(0, 0, 0, 0, 64)]))
        assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
        owner.signal(signal.SIGSTOP)
        here.memory[0][:] = 253
        tickets = [here.transport.submit(peer, WRITE, copies(WHOLE)) for _ in range(2)]
        wait_until("it has begun", lambda: any(each.state for each in list(here.transport._active)))
        close = here.transport.close_peer(peer)
        owner.signal(signal.SIGCONT)
        ended = wait_for(here.transport, *tickets, close)
        assert ended[close].status is TransferStatus.OK
        assert {ended[each].status for each in tickets} <= {TransferStatus.OK, TransferStatus.FAILED}
        landed = owner.count(253)
        here.memory[0][:] = 254
        time.sleep(1)
        assert (owner.count(253), owner.count(254)) == (landed, 0), "bytes landed behind the fence"
    finally:
        here.transport.close()


@pytest.mark.parametrize("op", TransferOp)
def test_two_hung_peers_closed_at_once_end_alike(start_owner, monkeypatch: pytest.MonkeyPatch, op: TransferOp) -> None:
    """The first close destroys what the second one's transfer runs on: that must not make it look as if it never ran.

    A third peer cannot be connected to again then: its own trouble.
    """
    monkeypatch.setattr(NixlTransport, "drain_s", 2.0)
    monkeypatch.setenv("UCX_TLS", "tcp")
    here = nixl_end([SIZE])
    try:
        owners = [start_owner() for _ in range(4)]
        *hung, lost, fine = peers = [here.transport.connect(owner.blob) for owner in owners]
        for peer in peers:
            ticket = here.transport.submit(peer, READ, copies([(0, 0, 0, 0, 64)]))
            assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
        for owner in owners[:2]:
            owner.signal(signal.SIGSTOP)
        tickets = [here.transport.submit(peer, op, copies(WHOLE)) for peer in hung]
        time.sleep(1)
        assert here.transport.poll() == []
        add = here.transport._open_peer

        def add_all_but_one(peer: PeerHandle) -> None:
            if peer is lost:
                raise RuntimeError("nobody expected this")
            add(peer)

        monkeypatch.setattr(here.transport, "_open_peer", add_all_but_one)
        with here.transport._lock:  # both commands are in one batch
            closes = [here.transport.close_peer(peer) for peer in hung]
        ended = wait_for(here.transport, *tickets, *closes)
        is_read = op is READ
        expected = [TransferStatus.FAILED] * 2 + [TransferStatus.OK] * 2 if is_read else [TransferStatus.UNKNOWN] * 4
        assert [ended[ticket].status for ticket in (*tickets, *closes)] == expected
        ticket = here.transport.submit(lost, READ, copies(WHOLE))
        assert "nobody expected this" in wait_for(here.transport, ticket)[ticket].reason
        ticket = here.transport.submit(fine, READ, copies(WHOLE))
        assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
        assert np.array_equal(here.memory[0], EXPECTED)
        here.memory[0][:] = 253
        for owner in owners[:2]:
            owner.signal(signal.SIGCONT)
        time.sleep(2)
        assert (here.memory[0] == 253).all(), "bytes landed behind the fence"
    finally:
        here.transport.close()


def test_a_peer_whose_end_is_known_before_the_library_knows_is_closed_for_certain(
    start_owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(NixlTransport, "_is_done", lambda *_: False)
    here = nixl_end([SIZE])
    try:
        owner = start_owner()
        peer = here.transport.connect(owner.blob)
        ticket = here.transport.submit(peer, WRITE, copies(WHOLE))
        time.sleep(0.5)
        owner.kill()
        close = here.transport.close_peer(peer)
        ended = wait_for(here.transport, ticket, close)
        assert (ended[ticket].status, ended[close].status) == (TransferStatus.FAILED, TransferStatus.OK)
        monkeypatch.undo()
        _read_all(start_owner(), here)
    finally:
        here.transport.close()


def _read_all(owner: Owner, here: End) -> None:
    here.memory[0][:] = 0
    ticket = here.transport.submit(here.transport.connect(owner.blob), READ, copies(WHOLE))
    assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
    assert np.array_equal(here.memory[0], EXPECTED)


def test_missing_library_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(ConfigError, match="pip install"):
        NixlTransport("test")


def test_settings_that_nixl_refuses_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="NIXL cannot register"):
        NixlTransport("test", {"num_threads": "abc"}).register([Region(4096, 100)])


def test_whatever_an_agent_raises_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that `auto` goes on with what else there is."""
    transport = NixlTransport("test")

    def no_plugins(*_: object) -> None:
        raise RuntimeError("No plugins available for NIXL")

    monkeypatch.setattr(transport._api, "nixl_agent", no_plugins)
    with pytest.raises(ConfigError, match=r"NIXL cannot register .*RuntimeError: No plugins available"):
        transport.register([Region(4096, 100)])


def test_memory_that_cannot_be_registered_is_named() -> None:
    with pytest.raises(ConfigError, match="one kind"):
        NixlTransport("test").register([Region(4096, 100), Region(4096, 100, "cuda:0")])
