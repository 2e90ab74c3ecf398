"""The transport passes kvferry's checks; what only this transport does is below them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from kvferry_transport_vm import MAX_VECTORS, VmTransport, _steps

from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.transports.transport import Region, TransferOp, TransferStatus, TransportSetup
from kvferry.testing.transport_checks import End, TransportChecks, copies, wait_for

OTHER = """
import sys, numpy
from kvferry.p2p.transports.transport import Region
from kvferry_transport_vm import VmTransport
memory = numpy.full(1 << 20, 9, numpy.uint8)
transport = VmTransport("other")
transport.register([Region(memory.ctypes.data, memory.nbytes)])
print(transport.local_blob().hex(), flush=True)
sys.stdin.readline()
print(memory[:5].tolist(), flush=True)
sys.stdin.readline()
"""


class TestVm(TransportChecks):
    def make(self, region_bytes: Sequence[int]) -> End:
        memory = [np.zeros(num_bytes, np.uint8) for num_bytes in region_bytes]
        transport = VmTransport.from_config(TransportSetup("test", {"step_bytes": 65536}))
        transport.register([Region(array.ctypes.data, array.nbytes) for array in memory])
        return End(transport, memory)


def test_another_process_is_read_and_written_and_its_death_is_seen() -> None:
    other = subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    memory = np.zeros(1 << 20, np.uint8)
    transport = VmTransport("test")
    transport.register([Region(memory.ctypes.data, memory.nbytes)])
    peer = transport.connect(bytes.fromhex(other.stdout.readline()))
    read = transport.submit(peer, TransferOp.READ, copies([(0, 0, 0, 0, 1 << 20)]))
    assert wait_for(transport, read)[read].status is TransferStatus.OK
    assert memory.min() == memory.max() == 9
    memory[:] = 5
    write = transport.submit(peer, TransferOp.WRITE, copies([(0, 0, 0, 0, 3)]))
    assert wait_for(transport, write)[write].status is TransferStatus.OK
    other.stdin.write("\n")
    other.stdin.flush()
    assert other.stdout.readline() == "[5, 5, 5, 9, 9]\n"
    assert not transport.peer_has_ended(peer)
    other.kill()
    other.communicate()
    assert transport.peer_has_ended(peer)
    late = transport.submit(peer, TransferOp.READ, copies([(0, 0, 0, 0, 8)]))
    completion = wait_for(transport, late)[late]
    assert (completion.status, completion.num_bytes) == (TransferStatus.FAILED, 0)
    transport.close()


def test_steps_are_bounded_and_are_all_of_it() -> None:
    pieces = copies([(0, 7, 1, 0, 100_000), *((0, 200_000 + 2 * i, 1, 200_000 + i, 1) for i in range(5000))])
    steps = list(_steps(pieces, 4096))
    assert max(step.length.sum() for step in steps) <= 4096
    assert max(len(step.length) for step in steps) <= MAX_VECTORS
    moved = np.concatenate([np.arange(at, at + n) for step in steps for at, n in zip(step[3], step[4], strict=True)])
    assert moved.tolist() == [*range(100_000), *range(200_000, 205_000)]


def test_settings_are_checked() -> None:
    VmTransport.check({}, "x")
    with pytest.raises(ConfigError, match=r"x\.step_byte is unknown"):
        VmTransport.check({"step_byte": 1}, "x")
    with pytest.raises(ConfigError, match="at least 4096"):
        VmTransport.from_config(TransportSetup("test", {"step_bytes": 1}, "x"))


def test_a_blob_cannot_name_other_files() -> None:
    transport = VmTransport("test")
    memory = np.zeros(100, np.uint8)
    transport.register([Region(memory.ctypes.data, memory.nbytes)])
    blob = msgspec.msgpack.decode(transport.local_blob())
    for change in ({"life": "/etc/passwd"}, {"boot_id": "elsewhere"}, {"process_ids": "pid:[1]"}, {"process": 0}):
        assert transport.why_unreachable(msgspec.msgpack.encode(blob | change))
        with pytest.raises(TransferError):
            transport.connect(msgspec.msgpack.encode(blob | change))
    transport.close()
