"""Shared memory between workers: the shared checks, the pool, and real processes that are killed and stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from kvferry.contract import FullAttentionSpec, make_kv_cache_config
from kvferry.engine.kv_groups import KVBuffer
from kvferry.errors import ConfigError, TransferError
from kvferry.p2p.transports.choice import create_transports
from kvferry.p2p.transports.shm import SharedPool, ShmTransport
from kvferry.p2p.transports.transport import Region, TransferOp, TransferStatus, TransportSetup
from kvferry.testing.transport_checks import End, TransportChecks, copies, wait_for
from kvferry.testing.transports import FakeNetwork, FakeTransport

READ, WRITE = TransferOp.READ, TransferOp.WRITE

OWNER = """
import sys, torch
from kvferry.p2p.transports.shm import SharedPool, ShmTransport
from kvferry.p2p.transports.transport import Region
pool = SharedPool("owner")
with pool.context():
    memory = torch.zeros(int(sys.argv[1]), dtype=torch.int8)
memory.copy_(torch.arange(len(memory)) % 251 - 125)
transport = ShmTransport(pool)
transport.register([Region(memory.data_ptr(), len(memory))])
print(transport.local_blob().hex(), flush=True)
for line in sys.stdin:
    print(int(memory[int(line)]), flush=True)
"""


def shm_end(region_bytes: Sequence[int]) -> tuple[End, SharedPool]:
    pool = SharedPool("test")
    tensors = [pool.zeros(num_bytes) for num_bytes in region_bytes]
    transport = ShmTransport(pool)
    transport.register([Region(tensor.data_ptr(), tensor.nbytes) for tensor in tensors])
    return End(transport, [tensor.numpy().view(np.uint8) for tensor in tensors]), pool


class TestShm(TransportChecks):
    def make(self, region_bytes: Sequence[int]) -> End:
        end, pool = shm_end(region_bytes)
        self.pools = {**getattr(self, "pools", {}), id(end.transport): pool}
        return end

    def dispose(self, end: End) -> None:
        super().dispose(end)
        self.pools[id(end.transport)].close()


class Owner:
    """Another process with a shared pool: byte i holds i % 251 - 125."""

    def __init__(self, num_bytes: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(num_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.blob = bytes.fromhex(self.process.stdout.readline())

    def byte(self, index: int) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{index}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner(32 << 20)
    yield owner
    owner.kill()


@pytest.fixture
def here() -> Iterator[End]:
    end, pool = shm_end([32 << 20])
    yield end
    end.transport.close()
    pool.close()


def expected_bytes(start: int, stop: int) -> np.ndarray:
    return (np.arange(start, stop) % 251 - 125).astype(np.int8).view(np.uint8)


def test_another_process_is_read_and_written(owner: Owner, here: End) -> None:
    peer = here.transport.connect(owner.blob)
    ticket = here.transport.submit(peer, READ, copies([(0, 1000, 0, 5, 20_000_000)]))
    assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
    assert np.array_equal(here.memory[0][5:20_000_005], expected_bytes(1000, 20_001_000))
    assert not here.memory[0][20_000_005:].any()
    here.memory[0][:3] = (7, 8, 9)
    ticket = here.transport.submit(peer, WRITE, copies([(0, 0, 0, 30_000_000, 3)]))
    assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
    assert [owner.byte(30_000_000 + i) for i in (0, 1, 2)] == [7, 8, 9]
    assert owner.byte(30_000_003) == 30_000_003 % 251 - 125


def test_a_stopped_process_can_still_be_read(owner: Owner, here: End) -> None:
    peer = here.transport.connect(owner.blob)
    owner.process.send_signal(signal.SIGSTOP)
    ticket = here.transport.submit(peer, READ, copies([(0, 0, 0, 0, 32 << 20)]))
    assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
    assert np.array_equal(here.memory[0], expected_bytes(0, 32 << 20))
    assert not here.transport.peer_has_ended(peer)


def path_of(owner: Owner) -> Path:
    return Path(msgspec.msgpack.decode(owner.blob)["parts"][0]["path"])


def test_whether_it_lives_tells_the_lock_and_not_the_name(owner: Owner, here: End) -> None:
    """Somebody has cleared /dev/shm: the owner lives, and could write to us. Both who had met it before and who had not
    see it, and see its end."""
    peers = [here.transport.connect(owner.blob)]
    path_of(owner).unlink()
    assert not here.transport.maker_has_ended(owner.blob)
    peers += [here.transport.connect(owner.blob)]
    ticket = here.transport.submit(peers[-1], READ, copies([(0, 1000, 0, 5, 1000)]))
    assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
    assert np.array_equal(here.memory[0][5:1005], expected_bytes(1000, 2000))
    assert not any(here.transport.peer_has_ended(peer) for peer in peers)
    blob = msgspec.msgpack.decode(owner.blob)
    for path in ("/proc/self/fd/0", "/proc/1/../self/fd/0", "/dev/zero", "/proc/99999999/fd/1", "/proc/0/fd/1"):
        part = {**blob["parts"][0], "descriptor": path}
        forged = msgspec.msgpack.encode({**blob, "parts": [part]})
        assert not here.transport.maker_has_ended(forged), "descriptors that no engine names are not looked at"
        assert "cannot map the KV pool" in (here.transport.why_unreachable(forged) or "")
    owner.process.send_signal(signal.SIGSTOP)
    assert not here.transport.maker_has_ended(owner.blob)
    owner.kill()
    assert here.transport.maker_has_ended(owner.blob)
    assert all(here.transport.peer_has_ended(peer) for peer in peers)
    for elsewhere in ({"process_ids": ""}, {"process_ids": "pid:[1]"}, {"boot_id": "another"}):
        of_another = msgspec.msgpack.encode({**blob, **elsewhere})
        assert not here.transport.maker_has_ended(of_another), "another container or machine counts otherwise"


def test_a_killed_process_is_told_and_the_next_one_works(owner: Owner, here: End) -> None:
    peer = here.transport.connect(owner.blob)
    ticket = here.transport.submit(peer, READ, copies([(0, 0, 0, 0, 8)]))
    assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
    owner.kill()
    assert here.transport.peer_has_ended(peer)
    ticket = here.transport.submit(peer, WRITE, copies([(0, 0, 0, 0, 8)]))
    completion = wait_for(here.transport, ticket)[ticket]
    assert completion.status is TransferStatus.FAILED
    assert "has ended" in completion.reason
    close = here.transport.close_peer(peer)
    assert wait_for(here.transport, close)[close].status is TransferStatus.OK
    successor = Owner(4096)  # sweeps its predecessor's memory
    try:
        assert "cannot map" in str(here.transport.why_unreachable(owner.blob))
        ticket = here.transport.submit(here.transport.connect(successor.blob), READ, copies([(0, 0, 0, 0, 4096)]))
        assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
        assert np.array_equal(here.memory[0][:4096], expected_bytes(0, 4096))
    finally:
        successor.kill()


def test_killed_in_mid_transfer_is_failed_not_half_a_success(owner: Owner, here: End) -> None:
    """Tiny pieces make the transfer take long enough to be hit."""
    peer = here.transport.connect(owner.blob)
    at = np.arange(1 << 20) * 32
    zeros = np.zeros_like(at)
    pieces = copies([])._replace(
        source_region=zeros, source_offset=at, destination_region=zeros, destination_offset=at, length=zeros + 31
    )
    tickets = [here.transport.submit(peer, READ, pieces) for _ in range(16)]
    deadline_s = time.monotonic() + 30
    while not here.transport.bytes_moved[READ]:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)  # a loop that spins would keep the interpreter from the transport's thread
    owner.kill()
    ended = wait_for(here.transport, *tickets)
    assert ended[tickets[-1]].status is TransferStatus.FAILED
    assert here.transport.bytes_moved[READ] == sum(completion.num_bytes for completion in ended.values())


def test_the_context_serves_the_hosts_one_allocation_and_no_other() -> None:
    pool = SharedPool("test")
    with pool.context():
        kv = torch.zeros(100_000, dtype=torch.int8, device=torch.device("cpu"))
        also = torch.zeros((5000,), dtype=torch.int8)
        others = [
            torch.zeros(10, dtype=torch.float32), torch.zeros(3, 4, dtype=torch.int8), torch.zeros(0, dtype=torch.int8),
            torch.ones(10, dtype=torch.int8),
        ]  # fmt: skip
    outside = torch.zeros(10, dtype=torch.int8)
    assert kv.shape == (100_000,)
    assert kv.dtype is torch.int8
    assert not kv.any()
    assert pool.place(kv.data_ptr(), 100_000) is not None
    assert pool.place(kv.data_ptr(), 100_001) is None
    assert pool.place(also.data_ptr() + 10, 4990) is not None
    assert all(pool.place(tensor.data_ptr(), 1) is None for tensor in (*others, outside))
    kv.view(torch.bfloat16)[3] = 1.5  # as hosts use it
    assert kv.untyped_storage().nbytes() == 100_000
    pool.close()
    assert kv.view(torch.bfloat16)[3] == 1.5  # the tensor outlives the pool


def test_our_engines_kv_memory_is_shared() -> None:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    config = make_kv_cache_config(10, {"layer.0": spec, "layer.1": spec})
    pool = SharedPool("test")
    kv = KVBuffer(config, "cpu", pool.context())
    storage = kv.views()["layer.1"].untyped_storage()
    transport = ShmTransport(pool)
    transport.register([Region(storage.data_ptr(), storage.nbytes())])
    transport.close()
    pool.close()


def test_memory_from_elsewhere_is_refused_with_the_remedy() -> None:
    tensor = torch.zeros(100, dtype=torch.int8)
    with pytest.raises(ConfigError, match="get_mem_pool_context"):
        ShmTransport(SharedPool("test")).register([Region(tensor.data_ptr(), 100)])
    with pytest.raises(ConfigError, match="not of cuda:0"):
        ShmTransport(SharedPool("test")).register([Region(4096, 100, "cuda:0")])


def shrink_shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container: 4096 bytes are free in its /dev/shm."""
    monkeypatch.setattr("kvferry.p2p.transports.shm.SHM_DIRECTORY", tmp_path / "shm")
    real = os.statvfs
    stat = namedtuple("stat", "f_bavail f_blocks f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda path: stat(1, 1, 4096) if Path(path).name == "shm" else real(path))


def test_auto_does_without_shared_memory_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shrink_shm(tmp_path, monkeypatch)
    nixl = FakeTransport(FakeNetwork(), "nixl")
    monkeypatch.setattr("kvferry.p2p.transports.nixl.NixlTransport.from_config", lambda setup: nixl)
    pools = {name: SharedPool("test", is_optional=name == "auto") for name in ("auto", "shm")}
    with pools["shm"].context(), pytest.raises(ConfigError, match="no room"):
        torch.zeros(100_000, dtype=torch.int8)
    with pools["auto"].context():
        kv = torch.zeros(100_000, dtype=torch.int8)
    assert kv.shape == (100_000,)
    assert not kv.any()
    assert f"{tmp_path / 'shm'}: 4096 bytes are free" in caplog.text
    regions = [Region(kv.data_ptr(), 100_000)]
    assert create_transports("auto", regions, TransportSetup("test", pool=pools["auto"]), {}) == {"nixl": nixl}
    with pytest.raises(ConfigError, match=r"shm: .*4096 bytes are free.*; nixl: .*registered once"):
        create_transports("auto", regions, TransportSetup("test", pool=pools["auto"]), {})


def test_too_small_shared_memory_falls_to_a_folder_or_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink_shm(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"docker --shm-size.*shm_dir"):
        SharedPool("test").zeros(100_000)
    pool = SharedPool("test", tmp_path / "disk")
    tensor = pool.zeros(100_000)
    (file,) = (tmp_path / "disk").iterdir()
    assert file.stat().st_size >= 100_000
    assert file.stat().st_mode & 0o777 == 0o600
    tensor[5] = 3
    pool.close()
    assert not file.exists()


def test_memory_of_another_user_is_explained(here: End, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    why = here.transport.why_unreachable(here.transport.local_blob())
    assert "Permission denied; its owner runs as another user" in str(why)


@pytest.mark.parametrize("path", ["/etc/passwd", "kvferry-x-1-0123456789abcdef", "/dev/shm/kvferry-x-1-0123"])
def test_a_blob_cannot_name_other_files(here: End, path: str) -> None:
    blob = msgspec.msgpack.decode(here.transport.local_blob())
    blob["parts"][0]["path"] = path
    why = str(here.transport.why_unreachable(msgspec.msgpack.encode(blob)))
    assert f"{path} is no file of kvferry's in /dev/shm: set kv_connector_extra_config.shm_dir" in why


def test_memory_is_mapped_from_dev_shm_and_the_engines_own_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {}
    with monkeypatch.context() as patch:
        shrink_shm(tmp_path, patch)
        for name, folder in (("owner", "a"), ("same", "a"), ("other", "b")):
            pool = SharedPool(name, tmp_path / folder)
            transport = ShmTransport(pool)
            kv = pool.zeros(100_000)
            transport.register([Region(kv.data_ptr(), kv.nbytes)])
            ends[name] = transport, pool, kv
    blob = ends["owner"][0].local_blob()
    assert ends["same"][0].why_unreachable(blob) is None
    why = str(ends["other"][0].why_unreachable(blob))
    assert f"{tmp_path}/a/kvferry-owner-" in why
    assert f"is no file of kvferry's in {tmp_path}/shm or {tmp_path}/b: set" in why
    for transport, pool, _ in ends.values():
        transport.close()
        pool.close()


def random_value(rng: random.Random) -> object:
    plain = [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**47,
        2**48,
        2**48 + 1,
        2**62,
        2**63 - 1,
        2**63,
        2**64 - 1,
        1.5,
        float("nan"),
    ]
    texts = ["", "\0", "/dev/shm/kvferry-x-1-0123456789abcdef", "/dev/shm\0/kvferry-x-1-0123456789abcdef", "x" * 9000]
    texts += ["/dev/shm/kvferry-" + "x" * 900 + "-1-0123456789abcdef"]
    texts += ["/dev/shm/" + "a/" * 3000 + "kvferry-x-1-0123456789abcdef", "/dev/shm/kvferry-x-\u0661-0123456789abcdef"]
    return rng.choice(
        [*plain, *texts, b"", b"n" * 16, b"n" * 5000, [], [[0, 0, 0]], [[0, -1, 2]], [[0, 2**63, 2**63]], {}]
    )


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_blob_says_is_a_transfer_error(here: End, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        blob = msgspec.msgpack.decode(here.transport.local_blob())
        for _ in range(rng.randint(1, 2)):
            place = (
                rng.choice([blob, blob["parts"][0]]) if isinstance(blob.get("parts"), list) and blob["parts"] else blob
            )
            if isinstance(place, dict):
                place[rng.choice([*place])] = random_value(rng)
        raw = msgspec.msgpack.encode(blob)
        for ask in (here.transport.why_unreachable, here.transport.maker_has_ended):
            ask(raw)
        try:
            here.transport.close_peer(here.transport.connect(raw))
        except TransferError:
            continue


@pytest.mark.parametrize(
    ("field", "value"), [("num_bytes", -1), ("num_bytes", 2**63), ("path", "/dev/shm/a\0/kvferry-x-1-0123456789abcdef")]
)
def test_values_that_no_pool_has_are_refused(here: End, field: str, value: object) -> None:
    blob = msgspec.msgpack.decode(here.transport.local_blob())
    blob["parts"][0][field] = value
    blob["regions"] = []
    assert here.transport.why_unreachable(msgspec.msgpack.encode(blob))


@pytest.mark.parametrize("fault", ["mode", "link", "user"])
def test_files_that_others_could_truncate_are_not_mapped(
    here: End, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = here.transport.local_blob()
    path = Path(msgspec.msgpack.decode(blob)["parts"][0]["path"])
    other = path.with_name(f"kvferry-link-1-{os.getpid():016x}")
    assert here.transport.why_unreachable(blob) is None
    if fault == "mode":
        path.chmod(0o620)
    elif fault == "link":
        os.link(path, other)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    try:
        assert "a file of this user, with mode 0600 and a single name" in str(here.transport.why_unreachable(blob))
    finally:
        other.unlink(missing_ok=True)


def test_another_boot_is_another_machine(here: End) -> None:
    blob = here.transport.local_blob()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    other = blob.replace(boot_id, b"0" * 36)
    assert here.transport.why_unreachable(other) == "the peer is on another machine"
    with pytest.raises(TransferError, match="another machine"):
        here.transport.connect(other)


def test_only_what_is_copied_is_mapped() -> None:
    (here, own), (there, pool) = shm_end([64 << 20]), shm_end([64 << 20])
    there.memory[0][:] = np.arange(64 << 20, dtype=np.int64) % 251
    blob = there.transport.local_blob()
    path = msgspec.msgpack.decode(blob)["parts"][0]["path"]
    peer = here.transport.connect(blob)
    pieces = [(0, 40 << 20, 0, 7, 100), (0, 10 << 20, 0, 1 << 20, 5 << 20)]
    try:
        ticket = here.transport.submit(peer, READ, copies(pieces))
        assert wait_for(here.transport, ticket)[ticket].status is TransferStatus.OK
        for _, source, _, destination, length in pieces:
            assert np.array_equal(here.memory[0][destination:][:length], there.memory[0][source:][:length])
        peers, owners = sorted(_resident_bytes(path))
        assert 5 << 20 <= peers <= 8 << 20, "areas 5, 6, 7 and 20 of 2 MiB; the last one only where the kernel can"
        assert owners >= 64 << 20
    finally:
        for end, memory in ((here, own), (there, pool)):
            end.transport.close()
            memory.close()


def _resident_bytes(path: str) -> list[int]:
    """Of each of our mappings of this file (proc_pid_smaps(5))."""
    found, is_it = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:") and is_it:
            found.append(int(line.split()[1]) << 10)
        elif "-" in line.split()[0]:
            is_it = line.endswith(path)
    return found
