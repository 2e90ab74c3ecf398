"""A worker's links, over a fake network."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvferry.clock import FakeClock
from kvferry.p2p.links import Links, _Link
from kvferry.p2p.step_messages import OpenOrder
from kvferry.p2p.transports.transport import PeerHandle, Region, TransferOp
from kvferry.testing.transport_checks import copies
from kvferry.testing.transports import FakeNetwork, FakeTransport


class Forgetful(FakeTransport):
    """Of a peer that was closed for certain it knows nothing more, as real ones."""

    def __init__(self, network: FakeNetwork) -> None:
        super().__init__(network)
        self.forgotten: set[PeerHandle] = set()

    def close_peer(self, peer: PeerHandle) -> int:
        if not any(one.peer is peer for one in self._open):
            self.forgotten.add(peer)
        return super().close_peer(peer)

    def peer_has_ended(self, peer: PeerHandle) -> bool:
        return peer not in self.forgotten and super().peer_has_ended(peer)


def test_a_link_of_which_one_worker_was_closed_for_certain_ends_with_the_other() -> None:
    clock = FakeClock()
    network = FakeNetwork(clock)
    here, hung, fine = ends = [Forgetful(network) for _ in range(3)]
    memory = [np.zeros(100, np.uint8) for _ in ends]
    for end, array in zip(ends, memory, strict=True):
        end.register([Region(array.ctypes.data, 100)])
    links = Links(0, "fake", {"fake": here})
    peers = [here.connect(end.local_blob()) for end in (hung, fine)]
    nothing: Any = None
    order = OpenOrder(7, "peer:1", b"", b"", {}, is_writer=False)
    links._links[7] = _Link(order, nothing, nothing, {rank: (here, peer) for rank, peer in enumerate(peers)})
    here.faults.hangs, here.faults.lands_late_s = True, 5.0
    here.submit(peers[0], TransferOp.WRITE, copies([(0, 0, 0, 0, 100)]))
    links.close(7)
    assert here._completions.pop(0).ticket == 1, "the write, of no job"
    assert links.poll().closed == []
    clock.advance(100)
    here.poll()
    assert links.poll().closed == [], "the peer lives"
    hung.kill()
    assert links.poll().closed == [(7, 0)]
    assert links.poll().closed == []
