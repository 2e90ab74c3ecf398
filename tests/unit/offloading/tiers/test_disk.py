"""What only the disk tier does; what every tier does is in test_tier_checks.py."""

from __future__ import annotations

import errno
import os
import random
import signal
import struct
import threading
import zlib
from pathlib import Path

import pytest

from kvferry.clock import FakeClock
from kvferry.errors import ConfigError, TierBusy, TierCorrupt, TierUnavailable
from kvferry.offloading.store.tier import TierJob
from kvferry.offloading.tiers.disk import MAX_QUARANTINED, PAUSE_S, DiskTier
from kvferry.offloading.tiers.io_threads import Urgency
from kvferry.types import Namespace, StoreKey

CHUNK_BYTES = 4096 + 8192 + 80  # header, payload, share of the journal
FOLDER_BYTES = 8192
HOLDER = """
import sys
from pathlib import Path
from kvferry.offloading.tiers.disk import DiskTier
from kvferry.types import Namespace
tier = DiskTier(Path(sys.argv[1]), Namespace("00", {}))
print("held", flush=True)
sys.stdin.read()
"""


def chunk_path(tier: DiskTier, kit, i: int) -> Path:
    name = kit.key(i).hex()
    return tier._folder.path / kit.namespace.digest / name[:2] / f"{name}.kv"


# -- storing, loading ------------------------------------------------------------------------------------------------


def test_files_and_folders_are_private(make_disk, kit, tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        kit.store(make_disk(), 1)
    finally:
        os.umask(umask)
    for path in (tmp_path / "disk", *(tmp_path / "disk").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_the_header_says_what_the_file_is(make_disk, kit) -> None:
    tier = make_disk()
    kit.store(tier, 1)
    data = chunk_path(tier, kit, 1).read_bytes()
    assert len(data) == 4096 + 8192
    assert data[4096:] == kit.payload(kit.key(1))
    magic, version, _, num_bytes, digest = struct.unpack_from("<8sIIQ16s", data)
    assert (magic, version, num_bytes, digest) == (b"KVFCHUNK", 1, 8192, kit.digest(data[4096:]))
    for field in (kit.key(1), kit.namespace.digest.encode(), b"float32"):
        assert field in data[:4096]
    assert struct.unpack_from("<I", data, 4092)[0] == zlib.crc32(data[:4092])


def test_bytes_that_do_not_match_their_digest_are_not_written(make_disk, kit, tmp_path: Path) -> None:
    tier = make_disk()
    tier.submit_store(TierJob(1, kit.key(1), memoryview(bytes(8192)), b"x" * 16))
    result = kit.finish(tier)[0]
    assert isinstance(result.error, TierCorrupt)
    assert kit.key(1).hex() in str(result.error)
    assert not tier.contains([kit.key(1)])[0]
    assert not list((tmp_path / "disk").rglob("*.kv"))
    tier.check_integrity()


def test_loading_what_is_not_there_is_refused_at_once(make_disk, kit) -> None:
    with pytest.raises(TierUnavailable, match=kit.key(1).hex()):
        make_disk().submit_load(TierJob(1, kit.key(1), memoryview(bytearray(10))))


def test_a_file_that_vanished_is_a_miss(make_disk, kit) -> None:
    tier = make_disk()
    kit.store(tier, 1)
    chunk_path(tier, kit, 1).unlink()
    assert isinstance(kit.load(tier, 1)[0].error, TierUnavailable)
    assert not tier.contains([kit.key(1)])[0]
    assert tier.stats().used_bytes == FOLDER_BYTES
    assert kit.store(tier, 1).ok


# -- damage ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_damage_is_refused_named_set_aside_and_counted(make_disk, kit, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    places = random.Random(seed).sample(range(4096 + 8192), 30)
    tier = make_disk()
    for num_before, damage in enumerate([*places, 4095, 4096, "short", "empty", "long", "other"]):
        assert kit.store(tier, 1).ok
        path = chunk_path(tier, kit, 1)
        data = bytearray(path.read_bytes())
        if isinstance(damage, int):
            data[damage] ^= 1 << random.Random(seed + damage).randrange(8)
        elif damage == "other":
            kit.store(tier, 2)
            data = bytearray(chunk_path(tier, kit, 2).read_bytes())
        else:
            data = {"short": data[:-1], "empty": data[:0], "long": data + b"x"}[damage]
        path.write_bytes(data)
        result, _ = kit.load(tier, 1)
        assert isinstance(result.error, TierCorrupt), damage
        assert kit.key(1).hex() in str(result.error)
        assert not tier.contains([kit.key(1)])[0]
        assert tier.stats().num_corrupt == num_before + 1
        assert not path.exists()
        tier.drain(5)
        tier.poll()
        tier.check_integrity()
    tier.drain(5)
    tier.poll()
    assert len(list((tmp_path / "disk/quarantine").iterdir())) == MAX_QUARANTINED
    tier.close()
    assert make_disk().contains([kit.key(1), kit.key(2)]) == [False, True]


def test_a_flipped_byte_is_still_found_after_a_restart(make_disk, kit) -> None:
    tier = make_disk()
    kit.store(tier, 1)
    path = chunk_path(tier, kit, 1)
    tier.close()
    data = bytearray(path.read_bytes())
    data[5000] ^= 0x40
    path.write_bytes(data)
    tier = make_disk()
    assert tier.contains([kit.key(1)]) == [True]
    assert isinstance(kit.load(tier, 1)[0].error, TierCorrupt)
    assert tier.stats().details["num_quarantined"] == 1


def test_a_file_of_an_unknown_version_is_left_untouched(make_disk, kit) -> None:
    tier = make_disk(max_bytes=FOLDER_BYTES + 2 * CHUNK_BYTES)
    kit.store(tier, 1)
    path = chunk_path(tier, kit, 1)
    data = bytearray(path.read_bytes())
    data[8:12] = struct.pack("<I", 7)
    data[4092:4096] = struct.pack("<I", zlib.crc32(data[:4092]))
    path.write_bytes(data)
    result, _ = kit.load(tier, 1)
    assert not result.ok
    assert "version 7" in str(result.error)
    assert tier.contains([kit.key(1)]) == [False]
    assert tier.stats().num_unknown_format == 1
    with pytest.raises(TierUnavailable, match="must not replace"):
        kit.store(tier, 1)
    for i in range(2, 6):
        assert kit.store(tier, i).ok  # evicts among themselves
    assert path.read_bytes() == bytes(data)
    tier.check_integrity()


def test_a_folder_of_another_format_is_refused(make_disk, tmp_path: Path) -> None:
    make_disk().close()
    (tmp_path / "disk/FORMAT").write_text("kvferry-fs 2\n", "utf-8")
    with pytest.raises(ConfigError, match="kvferry-fs 2"):
        make_disk()
    (tmp_path / "disk/FORMAT").write_text("kvferry-fs 1\n", "utf-8")
    make_disk()


def test_strange_files_are_not_touched_leftovers_are_swept(make_disk, kit, tmp_path: Path) -> None:
    tier = make_disk()
    kit.store(tier, 1)
    tier.close()
    disk = tmp_path / "disk"
    strangers = [disk / "mine.txt", disk / "c0ffee00/readme", disk / "c0ffee00/00", disk / "other" / "00.kv"]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_bytes(b"x")
    (disk / "tmp/77").write_bytes(b"half a chunk")
    tier = make_disk()
    assert tier.stats().num_chunks == 1
    assert all(stranger.exists() for stranger in strangers)
    assert not list((disk / "tmp").iterdir())


# -- quota, order ----------------------------------------------------------------------------------------------------


def test_the_quota_is_never_exceeded_and_the_oldest_goes(make_disk, kit, tmp_path: Path) -> None:
    max_bytes = FOLDER_BYTES + 3 * CHUNK_BYTES
    seen: list[int] = []
    tier = make_disk(max_bytes=max_bytes, on_step=lambda _: seen.append(kit.folder_bytes(tmp_path / "disk")))
    for i in range(3):
        kit.store(tier, i)
    tier.touch([kit.key(0)])
    for i in range(3, 5):
        kit.store(tier, i)
    assert tier.contains([kit.key(i) for i in range(5)]) == [True, False, False, True, True]
    assert tier.stats().num_evicted == 2
    for i in range(5, 60):
        assert kit.store(tier, i).ok
        tier.touch([kit.key(i) for i in range(60)] * 20)
        tier.check_integrity()
    assert len(seen) > 100
    assert max(seen) <= max_bytes


def test_the_quota_holds_for_mixed_sizes_and_threads(make_disk, kit, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    max_bytes = 200_000
    tier = make_disk(max_bytes=max_bytes, num_threads=4)
    folder, lock, sizes, seen = tier._folder, threading.Lock(), {}, []
    write, unlink = folder.write, folder.unlink

    def counted_write(key: StoreKey, payload: memoryview, digest: bytes) -> None:
        with lock:  # counted before a byte is written, and until it is deleted: never too little
            sizes[f"{key.hex()}.kv"] = 4096 + len(payload)
            seen.append(sum(sizes.values()))
        write(key, payload, digest)

    def counted_unlink(name: str) -> None:
        unlink(name)
        with lock:
            del sizes[Path(name).name]

    folder.write, folder.unlink = counted_write, counted_unlink

    num_results = num_submitted = 0
    for i in range(300):
        data = kit.payload(kit.key(i), rng.randrange(1, 60_000))
        try:
            tier.submit_store(TierJob(i, kit.key(i), memoryview(data), kit.digest(data)))
            num_submitted += 1
        except TierBusy:
            tier.drain(5)
        if rng.random() < 0.3:
            num_results += sum(result.ok for result in tier.poll())
            tier.check_integrity()
    tier.drain(10)
    num_results += sum(result.ok for result in tier.poll())
    assert num_results == num_submitted > 100
    assert len(seen) > 100
    assert max(seen) <= max_bytes - FOLDER_BYTES
    assert kit.folder_bytes(tmp_path / "disk") <= max_bytes
    tier.check_integrity()


def test_a_lowered_quota_is_kept_from_the_start_oldest_first(make_disk, kit, tmp_path: Path) -> None:
    tier = make_disk()
    for i in range(6):
        kit.store(tier, i)
    tier.touch([kit.key(0)])
    tier.close()
    max_bytes = FOLDER_BYTES + 2 * CHUNK_BYTES
    tier = make_disk(max_bytes=max_bytes)
    assert tier.contains([kit.key(i) for i in range(6)]) == [True, False, False, False, False, True]
    assert kit.folder_bytes(tmp_path / "disk") <= max_bytes


def test_other_namespaces_count_and_are_evicted_too(make_disk, kit) -> None:
    other = Namespace("beef", {})
    tier = make_disk(namespace=other)
    for i in range(2):
        kit.store(tier, i)
    tier.close()
    tier = make_disk(max_bytes=FOLDER_BYTES + 3 * CHUNK_BYTES)
    assert tier.contains([kit.key(0)]) == [False]
    assert tier.stats().used_bytes == FOLDER_BYTES + 2 * CHUNK_BYTES
    kit.store(tier, 5)
    kit.store(tier, 6)
    assert tier.clear().num_chunks == 2
    tier.close()
    tier = make_disk(namespace=other)
    assert tier.contains([kit.key(0), kit.key(1), kit.key(5)]) == [False, True, False]


def test_order_survives_a_restart_and_a_damaged_journal(make_disk, kit, tmp_path: Path) -> None:
    tier = make_disk()
    for i in range(4):
        kit.store(tier, i)
    tier.touch([kit.key(i) for i in (2, 0, 3, 1)])
    tier.close()
    journal = tmp_path / "disk/journal"
    with journal.open("ab") as file:
        file.write(b"torn tai")
    tier = make_disk(max_bytes=FOLDER_BYTES + 4 * CHUNK_BYTES)
    for i, gone in ((10, 2), (11, 0)):
        kit.store(tier, i)
        assert not tier.contains([kit.key(gone)])[0]
    assert tier.contains([kit.key(3), kit.key(1)]) == [True, True]
    tier.close()
    journal.write_bytes(random.Random(1).randbytes(1000))
    tier = make_disk()
    assert tier.contains([kit.key(i) for i in (1, 3, 10, 11)]) == [True] * 4
    tier.close()
    journal.unlink()
    assert make_disk().contains([kit.key(i) for i in (1, 3, 10, 11)]) == [True] * 4


def test_the_journal_stays_small(make_disk, kit, tmp_path: Path) -> None:
    tier = make_disk()
    for i in range(3):
        kit.store(tier, i)
    for _ in range(200):
        tier.touch([kit.key(i) for i in range(3)] * 50)
        kit.wait_for(lambda: not tier.poll() and tier.drain(5))
    assert (tmp_path / "disk/journal").stat().st_size <= 4096 + 16 * 3


def test_what_is_being_loaded_is_not_evicted(make_disk, kit) -> None:
    gate = threading.Event()
    tier = make_disk(
        max_bytes=FOLDER_BYTES + CHUNK_BYTES, num_threads=1, on_step=lambda s: s == "chunk-write" and gate.wait(20)
    )
    gate.set()
    kit.store(tier, 1)
    buffer = bytearray(8192)
    tier.submit_load(TierJob(7, kit.key(1), memoryview(buffer)))
    data = kit.payload(kit.key(2))
    with pytest.raises(TierBusy, match="in use"):
        tier.submit_store(TierJob(8, kit.key(2), memoryview(data), kit.digest(data)))
    with pytest.raises(TierBusy):
        tier.submit_store(TierJob(8, kit.key(1), memoryview(data), kit.digest(data)))
    assert kit.finish(tier)[0].ok
    assert kit.store(tier, 2).ok


@pytest.mark.parametrize("max_bytes", [0, 100, FOLDER_BYTES, FOLDER_BYTES + CHUNK_BYTES - 1])
def test_a_quota_below_one_chunk_is_refused(make_disk, max_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"max_bytes {max_bytes}"):
        make_disk(max_bytes=max_bytes).check_fits(8192)


def test_a_quota_of_exactly_one_chunk_works(make_disk, kit, tmp_path: Path) -> None:
    tier = make_disk(max_bytes=FOLDER_BYTES + CHUNK_BYTES)
    tier.check_fits(8192)
    for i in range(3):
        assert kit.store(tier, i).ok
        assert kit.folder_bytes(tmp_path / "disk") <= FOLDER_BYTES + CHUNK_BYTES
    assert tier.contains([kit.key(i) for i in range(3)]) == [False, False, True]


def test_nothing_is_written_under_a_name_that_is_still_to_be_deleted(make_disk, kit) -> None:
    gate = threading.Event()
    gate.set()
    tier = make_disk(
        max_bytes=FOLDER_BYTES + 2 * CHUNK_BYTES, num_threads=1, on_step=lambda s: s == "chunk-write" and gate.wait(20)
    )
    kit.store(tier, 1)
    kit.store(tier, 2)
    gate.clear()
    data = [kit.payload(kit.key(i)) for i in range(5)]
    for i in (3, 4):  # the second waits for the only thread, and so does the deletion of 2
        tier.submit_store(TierJob(i, kit.key(i), memoryview(data[i]), kit.digest(data[i])))
    with pytest.raises(TierBusy, match="deleted"):
        tier.submit_store(TierJob(5, kit.key(2), memoryview(data[2]), kit.digest(data[2])))
    gate.set()
    assert all(result.ok for result in kit.finish(tier, 2))
    assert kit.store(tier, 2).ok
    assert kit.load(tier, 2)[1] == data[2]


# -- the disk refuses ------------------------------------------------------------------------------------------------


def test_disk_full_is_reported_cleaned_up_and_pauses_stores(make_disk, kit, tmp_path: Path) -> None:
    clock = FakeClock()
    is_full = True

    def on_step(step: str) -> None:
        if step == "chunk-write" and is_full:
            raise OSError(errno.ENOSPC, "No space left on device")

    tier = make_disk(clock=clock, on_step=on_step)
    result = kit.store(tier, 1)
    assert isinstance(result.error, TierUnavailable)
    assert "No space left" in str(result.error)
    assert not list((tmp_path / "disk/tmp").iterdir())
    assert not tier.contains([kit.key(1)])[0]
    assert tier.stats().used_bytes == FOLDER_BYTES
    is_full = False
    with pytest.raises(TierBusy, match="paused"):
        kit.store(tier, 1)
    clock.advance(PAUSE_S)
    assert kit.store(tier, 1).ok
    assert tier.stats().details["num_pauses"] == 1
    tier.check_integrity()


def test_a_failed_write_leaves_what_it_would_have_evicted_or_counts_it_gone(make_disk, kit) -> None:
    clock = FakeClock()
    failing: set[str] = set()

    def on_step(step: str) -> None:
        if step in failing:
            raise OSError(errno.EIO, "Input/output error")

    tier = make_disk(max_bytes=FOLDER_BYTES + CHUNK_BYTES, on_step=on_step, clock=clock)
    kit.store(tier, 1)
    tier.submit_store(TierJob(2, kit.key(2), memoryview(bytes(8192)), b"x" * 16))  # refused before it evicts
    assert not kit.finish(tier)[0].ok
    assert kit.load(tier, 1)[1] == kit.payload(kit.key(1))
    for step in ("chunk-write", "chunk-rename"):
        failing.add(step)
        assert not kit.store(tier, 3).ok
        tier.check_integrity()
        assert tier.contains([kit.key(1), kit.key(3)]) == [False, False]
        failing.clear()
    assert kit.store(tier, 3).ok


def test_a_full_disk_still_opens_for_reading(make_disk, kit, tmp_path: Path, monkeypatch) -> None:
    tier = make_disk()
    kit.store(tier, 1)
    tier.close()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.write", full)
    tier = make_disk()
    monkeypatch.undo()
    assert kit.load(tier, 1)[1] == kit.payload(kit.key(1))


# -- removing, closing, locking --------------------------------------------------------------------------------------


def test_remove_and_clear(make_disk, kit, tmp_path: Path) -> None:
    tier = make_disk()
    for i in range(4):
        kit.store(tier, i)
    tier.remove([kit.key(1), kit.key(77)])
    assert tier.contains([kit.key(0), kit.key(1)]) == [True, False]
    receipt = tier.clear()
    assert (receipt.tier, receipt.num_chunks) == ("fs", 3)
    assert not any(tier.contains([kit.key(i) for i in range(4)]))
    tier.drain(5)
    tier.poll()
    tier.check_integrity()
    assert tier.stats().used_bytes == FOLDER_BYTES
    assert not list((tmp_path / "disk").rglob("*.kv"))


def test_close_ends_every_job_exactly_once(make_disk, kit) -> None:
    gate = threading.Event()
    entered = threading.Event()

    def on_step(step: str) -> None:
        if step == "chunk-write":
            entered.set()
            gate.wait(20)

    tier = make_disk(num_threads=1, on_step=on_step)
    data = [kit.payload(kit.key(i)) for i in range(3)]
    for i in range(3):
        tier.submit_store(TierJob(i, kit.key(i), memoryview(data[i]), kit.digest(data[i])))
    entered.wait(20)
    assert not tier.drain(0.01)

    def open_when_closing() -> None:
        kit.wait_for(lambda: not tier._threads.num_queued(Urgency.STORE))  # ended by `close`: the one thread is busy
        gate.set()

    opener = threading.Thread(target=open_when_closing)
    opener.start()
    tier.close()
    tier.close()
    opener.join()
    results = {result.job_id: result for result in tier.poll()}
    assert [results[i].ok for i in range(3)] == [True, False, False]
    assert isinstance(results[1].error, TierUnavailable)
    assert tier.poll() == []
    with pytest.raises(TierUnavailable, match="closed"):
        tier.submit_store(TierJob(9, kit.key(9), memoryview(data[0]), kit.digest(data[0])))
    assert tier.contains([kit.key(0)]) == [False]
    assert make_disk().contains([kit.key(i) for i in range(3)]) == [True, False, False]


def test_one_process_at_a_time_and_sigkill_frees_the_folder(make_disk, kit, tmp_path: Path) -> None:
    holder = kit.spawn(HOLDER, tmp_path / "disk")
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=rf"pid {holder.pid}\b"):
        make_disk()
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=30)
    tier = make_disk()
    with pytest.raises(ConfigError, match=rf"pid {os.getpid()}\b"):
        make_disk()
    tier.close()
    make_disk()


def test_a_failed_opening_gives_the_lock_back(make_disk, tmp_path: Path) -> None:
    make_disk().close()
    (tmp_path / "disk/journal").unlink()
    (tmp_path / "disk/quarantine").rmdir()
    (tmp_path / "disk/quarantine").write_bytes(b"in the way")
    with pytest.raises(ConfigError, match="quarantine"):
        make_disk()
    (tmp_path / "disk/quarantine").unlink()
    make_disk()


# -- what others have put into the folder ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tmp", "quarantine", "c0ffee00"])
def test_linked_subfolders_are_refused_and_their_targets_left_alone(make_disk, tmp_path: Path, name: str) -> None:
    make_disk().close()
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "precious").write_bytes(b"x")
    (tmp_path / "disk" / name).rmdir()
    (tmp_path / "disk" / name).symlink_to(target)
    with pytest.raises(ConfigError, match=f"{name} is a link.*remove it"):
        make_disk()
    assert (target / "precious").read_bytes() == b"x"
    (tmp_path / "disk" / name).unlink()
    make_disk()


@pytest.mark.parametrize("name", [".", "tmp", "quarantine", "c0ffee00"])
@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_folders_that_others_can_write_to_are_refused(make_disk, tmp_path: Path, name: str, mode: int) -> None:
    make_disk().close()
    (tmp_path / "disk" / name).chmod(mode)
    with pytest.raises(ConfigError, match=r"other users can write there.*chmod go-w"):
        make_disk()
    (tmp_path / "disk" / name).chmod(0o700)
    make_disk()


def test_a_folder_of_another_user_is_refused(make_disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "disk").stat().st_uid + 1)
    with pytest.raises(ConfigError, match="another user's"):
        make_disk()
    assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
@pytest.mark.parametrize("name", ["journal", "journal.tmp", "FORMAT", "LOCK"])
def test_what_is_no_file_is_not_waited_for(make_disk, kit, tmp_path: Path, make, name: str) -> None:
    make_disk().close()
    path = tmp_path / "disk" / name
    path.unlink(missing_ok=True)
    make(path)
    if name in ("FORMAT", "LOCK") or (name, make) == ("journal", os.mkdir):
        with pytest.raises(ConfigError, match=r"cannot use|holds a store of format"):
            make_disk()
        return
    tier = make_disk()  # without an order of use
    kit.store(tier, 1)
    assert kit.load(tier, 1)[0].ok


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_a_chunk_that_is_no_file_is_a_miss_at_once_and_set_aside(make_disk, kit, make) -> None:
    tier = make_disk()
    kit.store(tier, 1)
    path = chunk_path(tier, kit, 1)
    path.unlink()
    make(path)
    assert isinstance(kit.load(tier, 1)[0].error, TierCorrupt)
    assert not path.exists()
    assert not tier.contains([kit.key(1)])[0]


def test_a_forked_child_does_not_keep_the_lock(make_disk) -> None:
    tier = make_disk()
    end, child_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(child_end)
        os.read(end, 1)  # until the parent has looked
        os._exit(0)
    try:
        tier.close()
        make_disk()
    finally:
        os.close(child_end)
        os.waitpid(pid, 0)
