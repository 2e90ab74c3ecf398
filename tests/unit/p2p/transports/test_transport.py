"""The seam: checks of pieces, the choice, and the fake that fails on demand."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.packages import install

from kvferry.clock import FakeClock
from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.config import P2PConfig
from kvferry.p2p.transports.choice import choose, create_transports
from kvferry.p2p.transports.shm import SharedPool
from kvferry.p2p.transports.threaded import Step, ThreadedTransport, Transfer
from kvferry.p2p.transports.transport import (
    PeerHandle,
    Region,
    TransferOp,
    TransferStatus,
    Transport,
    TransportCapabilities,
    TransportSetup,
)
from kvferry.testing.transport_checks import End, TransportChecks, copies, wait_for
from kvferry.testing.transports import FakeNetwork, FakeTransport

READ, WRITE = TransferOp.READ, TransferOp.WRITE
ALL = copies([(0, 0, 0, 0, 60), (0, 60, 0, 60, 40)])


def fake_end(network: FakeNetwork, region_bytes: Sequence[int], fill: int = 0, name: str = "fake") -> End:
    memory = [np.full(num_bytes, fill, np.uint8) for num_bytes in region_bytes]
    transport = FakeTransport(network, name)
    transport.register([Region(array.ctypes.data, array.nbytes) for array in memory])
    return End(transport, memory)


class TestFake(TransportChecks):
    network = FakeNetwork()

    def make(self, region_bytes: Sequence[int]) -> End:
        return fake_end(self.network, region_bytes)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pair(clock: FakeClock) -> tuple[End, End, PeerHandle]:
    network = FakeNetwork(clock)
    here, there = fake_end(network, [100], 1), fake_end(network, [100], 2)
    return here, there, here.transport.connect(there.transport.local_blob())


def test_a_delay_and_a_hang(pair, clock: FakeClock) -> None:
    here, _, peer = pair
    here.transport.faults.delay_s = 5
    slow = here.transport.submit(peer, READ, ALL)
    here.transport.faults.hangs = True
    here.transport.submit(peer, READ, ALL)
    assert here.transport.poll() == []
    clock.advance(5)
    assert [completion.ticket for completion in here.transport.poll()] == [slow]
    clock.advance(1e9)
    assert here.transport.poll() == []


@pytest.mark.parametrize("op", TransferOp)
def test_half_a_transfer(pair, op: TransferOp) -> None:
    here, there, peer = pair
    here.transport.faults.fails_after_bytes = 70
    ticket = here.transport.submit(peer, op, ALL)
    (completion,) = here.transport.poll()
    assert (completion.ticket, completion.status, completion.num_bytes) == (ticket, TransferStatus.FAILED, 70)
    written = (here if op is READ else there).memory[0]
    assert written.tolist() == [2 if op is READ else 1] * 70 + [1 if op is READ else 2] * 30


def test_bytes_land_after_the_peer_was_closed(pair, clock: FakeClock) -> None:
    here, _, peer = pair
    here.transport.faults.hangs = True
    here.transport.faults.lands_late_s = 2
    ticket = here.transport.submit(peer, READ, ALL)
    close = here.transport.close_peer(peer)
    ended = wait_for(here.transport, ticket, close)
    assert {completion.status for completion in ended.values()} == {TransferStatus.UNKNOWN}
    clock.advance(1.9)
    here.transport.poll()
    assert set(here.memory[0]) == {1}
    clock.advance(0.1)
    here.transport.poll()
    assert set(here.memory[0]) == {2}


def test_an_unknown_end_lands_unless_the_peer_is_closed(pair) -> None:
    here, _, peer = pair
    here.transport.faults.ends_unknown = True
    here.transport.submit(peer, READ, ALL)
    assert here.transport.poll()[0].status is TransferStatus.UNKNOWN
    close = here.transport.close_peer(peer)
    assert wait_for(here.transport, close)[close].status is TransferStatus.OK
    assert set(here.memory[0]) == {1}


def test_a_killed_peer_and_wrong_counters(pair) -> None:
    here, there, peer = pair
    here.transport.faults.miscounts_bytes = -3
    here.transport.submit(peer, READ, ALL)
    assert here.transport.poll()[0].num_bytes == 97
    assert here.transport.bytes_moved[READ] == 97
    there.transport.kill()
    assert here.transport.peer_has_ended(peer)
    here.transport.submit(peer, WRITE, ALL)
    assert here.transport.poll()[0].status is TransferStatus.FAILED


class Broken(ThreadedTransport):
    """A leaf whose library raises what nobody knows."""

    capabilities = TransportCapabilities("broken", devices=("cpu",))

    def _register(self) -> bytes:
        return b""

    def _parse(self, blob: bytes) -> PeerHandle:
        return PeerHandle(blob.decode(), [100])

    def _open_peer(self, peer: PeerHandle) -> None:
        if peer.name == "no open":
            raise OSError("nobody expected this")

    def _advance(self, transfer: Transfer) -> Step:
        raise ZeroDivisionError

    def _close_peer(self, peer: PeerHandle, open_ops: set[TransferOp]) -> set[TransferOp]:
        if peer.name == "no close":
            raise KeyError("oops")
        return set()

    def _shut_down(self) -> None:
        pass


def test_what_a_library_raises_ends_tickets_and_not_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    transport = Broken()
    transport.register([Region(4096, 100)])
    fine, no_open, no_close = (transport.connect(name) for name in (b"fine", b"no open", b"no close"))
    tickets = {peer.name: transport.submit(peer, READ, ALL) for peer in (fine, no_open, no_close)}
    ended = wait_for(transport, *tickets.values())
    assert ended[tickets["fine"]].status is TransferStatus.UNKNOWN
    assert "ZeroDivisionError" in ended[tickets["fine"]].reason
    assert ended[tickets["no open"]].status is TransferStatus.FAILED
    assert "nobody expected this" in ended[tickets["no open"]].reason
    closes = {peer.name: transport.close_peer(peer) for peer in (fine, no_open, no_close)}
    ended = wait_for(transport, *closes.values())
    assert ended[closes["fine"]].status is TransferStatus.OK
    assert ended[closes["no close"]].status is TransferStatus.UNKNOWN
    assert "KeyError" in ended[closes["no close"]].reason
    transport.close()


class Unserving(Broken):
    """A leaf whose library breaks while it serves peers."""

    is_shut_down = False
    breaks = False

    def _advance(self, transfer: Transfer) -> Step:
        return Step.WAITING

    def _serve(self) -> None:
        if self.breaks:
            raise ZeroDivisionError

    def _shut_down(self) -> None:
        self.is_shut_down = True


def test_a_library_that_breaks_while_it_serves_ends_tickets_and_not_the_thread() -> None:
    transport = Unserving()
    transport.register([Region(4096, 100)])
    peer = transport.connect(b"fine")
    ticket = transport.submit(peer, READ, ALL)
    transport.breaks = True
    completion = wait_for(transport, ticket)[ticket]
    assert (completion.status, completion.reason) == (TransferStatus.UNKNOWN, "ZeroDivisionError: ")
    close = transport.close_peer(peer)
    assert wait_for(transport, close)[close].status is TransferStatus.OK
    transport.close()
    assert transport.is_shut_down


def test_pieces_must_be_int64_arrays_of_one_length(pair) -> None:
    here, _, peer = pair
    for wrong in (ALL._replace(length=ALL.length[:1]), ALL._replace(length=ALL.length.astype(np.int32))):
        with pytest.raises(TransferError, match="five int64 arrays"):
            here.transport.submit(peer, READ, wrong)
    with pytest.raises(TransferError, match="piece 1 is outside the source memory: region 0, offset 61, 40 bytes"):
        here.transport.submit(peer, READ, copies([(0, 0, 0, 0, 60), (0, 61, 0, 60, 40)]))


def transports(network: FakeNetwork, *names: str) -> dict[str, Transport]:
    return {name: fake_end(network, [100], name=name).transport for name in names}


def blobs(of: dict[str, Transport]) -> dict[str, bytes]:
    return {name: transport.local_blob() for name, transport in of.items()}


def test_auto_takes_the_first_both_have_and_that_reaches() -> None:
    network = FakeNetwork()
    here, there = transports(network, "shm", "nixl"), transports(network, "shm", "nixl")
    assert choose("auto", here, blobs(there)) is here["shm"]
    assert choose("auto", here, {**blobs(there), "shm": b"other host"}) is here["nixl"]
    assert choose("auto", {"nixl": here["nixl"]}, blobs(there)) is here["nixl"]
    with pytest.raises(TransferError, match="shm: not offered by the peer; nixl: not available in this engine"):
        choose("auto", {"shm": here["shm"]}, {"nixl": b""})


def test_a_named_transport_is_never_substituted() -> None:
    network = FakeNetwork()
    here, there = transports(network, "shm", "nixl"), transports(network, "shm", "nixl")
    assert choose("nixl", here, blobs(there)) is here["nixl"]
    with pytest.raises(TransferError, match="shm: the blob is of no fake"):
        choose("shm", here, {**blobs(there), "shm": b"other host"})


def test_what_a_worker_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    pool = SharedPool("test")
    shared, private = pool.zeros(100), torch.zeros(100, dtype=torch.int8)
    offered = create_transports("auto", [Region(shared.data_ptr(), 100)], TransportSetup("test", pool=pool), {})
    assert list(offered) == ["shm"]
    offered["shm"].close()
    pool.close()
    regions = [Region(private.data_ptr(), 100)]
    with pytest.raises(ConfigError, match=r"shm: .*get_mem_pool_context.*; nixl: .*pip install"):
        create_transports("auto", regions, TransportSetup("test"), {})
    with pytest.raises(ConfigError, match="pip install"):
        create_transports("nixl", regions, TransportSetup("test"), {})
    with pytest.raises(ConfigError, match="did you mean 'nixl'"):
        create_transports("nixle", regions, TransportSetup("test"), {})


def test_transports_made_are_closed_when_the_next_one_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    shm = fake_end(FakeNetwork(), [100], name="shm").transport
    shm.regions = ()

    def breaks(*_: object) -> Transport:
        raise ZeroDivisionError

    monkeypatch.setattr("kvferry.p2p.transports.shm.ShmTransport.from_config", lambda setup: shm)
    monkeypatch.setattr("kvferry.p2p.transports.nixl.NixlTransport.from_config", breaks)
    with pytest.raises(ZeroDivisionError):
        create_transports("auto", [Region(4096, 100)], TransportSetup("test"), {})
    assert shm.is_dead


# ---- transports of installed packages --------------------------------------------------------------------------

THEIRS = """
from kvferry.errors import ConfigError
from kvferry.testing.transports import FakeNetwork, FakeTransport

network = FakeNetwork()

class Quiet(FakeTransport):
    seen = []
    @classmethod
    def from_config(cls, setup):
        cls.seen.append(setup)
        return cls(network, "quiet")
    @classmethod
    def check(cls, config, where):
        if "wrong" in config:
            raise ConfigError(f"{where}.wrong")

class Eager(Quiet):
    is_for_auto = uses_pool = True
    @classmethod
    def from_config(cls, setup):
        if "breaks" in setup.config:
            raise OSError("no card")
        return cls(network, "eager")

class Misnamed(Quiet): pass
class NoTransport:
    @classmethod
    def from_config(cls, setup):
        return 7
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "their_transports.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    classes = {"quiet": "Quiet", "eager": "Eager", "misnamed": "Misnamed", "none": "NoTransport", "gone": "Gone"}
    points = {name: f"their_transports:{attribute}" for name, attribute in classes.items()}
    install(tmp_path, "theirs", points, group="kvferry.transports")
    yield
    sys.modules.pop("their_transports", None)


@pytest.mark.usefixtures("theirs")
def test_a_transport_of_a_package_serves_by_name_with_its_settings() -> None:
    regions = [Region(4096, 100)]
    setup = TransportSetup("test", host="10.0.0.1")
    (made,) = create_transports("quiet", regions, setup, {"quiet": {"port": 1}, "other": {}}).items()
    assert made[0] == "quiet"
    (seen,) = made[1].seen  # type: ignore[attr-defined]
    assert (seen.engine_id, seen.config, seen.host) == ("test", {"port": 1}, "10.0.0.1")
    assert seen.where == "kv_connector_extra_config.transport_config.quiet"


@pytest.mark.usefixtures("theirs")
def test_auto_takes_those_that_say_so_after_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    regions = [Region(4096, 100)]
    made = create_transports("auto", regions, TransportSetup("test"), {})
    assert list(made) == ["eager"]
    assert "gone: " in caplog.text, "one that cannot be imported is no reason to fail"
    with pytest.raises(ConfigError, match=r"shm: .*; nixl: .*; eager: .*OSError: no card"):
        create_transports("auto", regions, TransportSetup("test"), {"eager": {"breaks": 1}})
    ours = {name: fake_end(FakeNetwork(), [100], name=name).transport for name in ("eager", "quiet", "shm")}
    assert choose("auto", ours, blobs(ours)) is ours["shm"]
    assert choose("auto", ours, {"eager": ours["eager"].local_blob()}) is ours["eager"]


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("misnamed", "registered as 'misnamed' calls itself 'quiet'"),
        ("none", "made 7, which lacks methods of a transport"),
        ("gone", "has no transport class 'Gone'"),
        ("nobody", "known: eager, gone, misnamed, nixl, none, quiet, shm"),
    ],
)
def test_transports_that_cannot_be_used(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        create_transports(name, [Region(4096, 100)], TransportSetup("test"), {})


@pytest.mark.usefixtures("theirs")
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"transport": "quite"}, r"transport='quite' is unknown \(did you mean 'quiet'\? known: auto, eager,"),
        ({"transport_config": {"quite": {}}}, "'quite' is unknown"),
        ({"transport_config": {"nixl": {}}}, "kvferry's own; its settings are shm_dir .* and ucx"),
        ({"transport_config": {"quiet": 7}}, r"transport_config\.quiet=7 must be an object"),
        ({"transport": "shm", "transport_config": {"quiet": {}}}, "quiet is given, but transport is 'shm'"),
    ],
)
def test_settings_of_transports_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        P2PConfig.parse(settings, {})


@pytest.mark.usefixtures("theirs")
def test_what_the_check_before_a_start_says_of_them() -> None:
    def problems(**settings: Any) -> list[str]:
        return P2PConfig.parse(settings, {}).problems()

    assert problems(transport="quiet") == problems(transport_config={"eager": {}}) == []
    assert problems(transport="quiet", transport_config={"quiet": {"wrong": 1}}) == [
        "kv_connector_extra_config.transport_config.quiet.wrong"
    ]
    (problem,) = problems(transport_config={"quiet": {}})
    assert "'auto' does not use 'quiet'" in problem
    assert not P2PConfig(transport="quiet").uses_pool
    assert P2PConfig(transport="eager").uses_pool


def test_the_fake_is_a_transport() -> None:
    assert isinstance(FakeTransport(FakeNetwork()), Transport)
