"""A disk tier whose folder went, lost its `tmp`, or is full comes back by itself, with one line in the log each way."""

from __future__ import annotations

import errno
import logging
import shutil
import stat
from itertools import pairwise
from pathlib import Path

import pytest

from kvferry.clock import FakeClock
from kvferry.errors import TierBusy, TierUnavailable
from kvferry.offloading.tiers.disk import MAX_PAUSE_S, PAUSE_S, DiskTier
from kvferry.types import Namespace

CHUNK_BYTES = 4096 + 8192 + 80  # header, payload, share of the journal
FOLDER_BYTES = 8192


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_folder_that_was_removed_is_made_again_at_the_next_store(make_disk, kit, tmp_path: Path, caplog) -> None:
    tier = make_disk(max_bytes=FOLDER_BYTES + 3 * CHUNK_BYTES)
    for i in range(3):
        kit.store(tier, i)
    shutil.rmtree(tmp_path / "disk")
    assert kit.store(tier, 7).ok
    tier.check_integrity()
    assert [tier.contains([kit.key(i)])[0] for i in (0, 1, 2, 7)] == [False, False, False, True]
    assert {key for key, _ in tier.take_lost()} == {kit.key(i) for i in range(3)}
    assert kit.load(tier, 7)[1] == kit.payload(kit.key(7))
    assert tier.stats().is_up
    assert len(lines(caplog)) == 1
    for path in (tmp_path / "disk").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    tier.close()
    assert kit.load(make_disk(), 7)[1] == kit.payload(kit.key(7)), "it is there after a restart, too"


def test_the_folder_made_again_is_locked(make_disk, kit, tmp_path: Path) -> None:
    tier = make_disk()
    kit.store(tier, 1)
    shutil.rmtree(tmp_path / "disk")
    kit.store(tier, 2)
    with pytest.raises(Exception, match="in use by another process"):
        DiskTier(tmp_path / "disk", kit.namespace)


@pytest.mark.parametrize("name", ["tmp", "quarantine", "c0ffee00", "FORMAT"])
def test_a_part_of_the_folder_that_was_swept_away_is_made_again(make_disk, kit, tmp_path: Path, name: str) -> None:
    tier = make_disk()
    kit.store(tier, 1)
    part = tmp_path / "disk" / name
    shutil.rmtree(part) if part.is_dir() else part.unlink()
    assert kit.store(tier, 2).ok
    assert kit.load(tier, 2)[1] == kit.payload(kit.key(2))
    assert tier.stats().is_up
    if name in ("tmp", "quarantine"):
        assert kit.load(tier, 1)[1] == kit.payload(kit.key(1)), "the chunks are still there"


def test_a_folder_that_another_process_took_meanwhile_is_left_alone_until_it_is_free(
    make_disk, kit, tmp_path: Path, caplog
) -> None:
    clock = FakeClock()
    tier = make_disk(clock=clock)
    kit.store(tier, 1)
    shutil.rmtree(tmp_path / "disk")
    other = DiskTier(tmp_path / "disk", Namespace("beef", {}))
    shutil.rmtree(tmp_path / "disk" / "tmp")
    assert isinstance(kit.store(tier, 2).error, TierUnavailable)
    assert not tier.stats().is_up
    other.close()
    clock.advance(PAUSE_S)
    kit.wait_for(lambda: (tier.poll(), tier.stats().is_up)[1], "the tier is back")
    assert kit.store(tier, 2).ok
    assert sum("down" in line for line in lines(caplog)) == 1
    assert sum("back" in line for line in lines(caplog)) == 1


def test_a_disk_that_is_not_mounted_is_not_replaced(make_disk, kit, tmp_path: Path, monkeypatch) -> None:
    """The mount point is an empty folder of another file system then; what is written there fills the wrong disk."""
    clock = FakeClock()
    tier = make_disk(clock=clock)
    kit.store(tier, 1)
    (tmp_path / "disk").rename(tmp_path / "away")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("kvferry.offloading.tiers.disk_files._device_of", lambda _: -1)
    result = kit.store(tier, 2)
    assert "mounted" in str(result.error)
    assert not list((tmp_path / "disk").iterdir())
    (tmp_path / "disk").rmdir()
    (tmp_path / "away").rename(tmp_path / "disk")
    clock.advance(PAUSE_S)
    kit.wait_for(lambda: (tier.poll(), tier.stats().is_up)[1], "the tier is back")
    assert kit.load(tier, 1)[1] == kit.payload(kit.key(1))
    assert kit.store(tier, 2).ok


def test_a_tier_that_is_down_tries_less_and_less_often(make_disk, kit, tmp_path: Path, monkeypatch, caplog) -> None:
    clock = FakeClock()
    tier = make_disk(clock=clock)
    probes: list[float] = []

    def refuse(*_: object) -> None:
        probes.append(clock.now())
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tier._folder, "write", refuse)
    monkeypatch.setattr(tier._folder, "probe", refuse)
    start = clock.now()
    assert not kit.store(tier, 1).ok
    assert not tier.stats().is_up
    with pytest.raises(TierBusy, match="paused"):
        kit.store(tier, 1)
    for _ in range(400):
        clock.advance(1)
        tier.poll()
        assert tier.drain(20)
        tier.poll()
    waits = [round(b - a) for a, b in pairwise(probes)]
    assert probes[0] == start
    assert waits == [5, 10, 20, 40, *[MAX_PAUSE_S] * (len(waits) - 4)]
    assert len(waits) > 8
    assert sum("down" in line for line in lines(caplog)) == 1, "one line, however long it lasts"
    monkeypatch.undo()
    clock.advance(MAX_PAUSE_S)
    kit.wait_for(lambda: (tier.poll(), tier.stats().is_up)[1], "the tier is back")
    assert kit.store(tier, 1).ok
    assert len(lines(caplog)) == 2


class SmallDisk:
    """A disk that holds so many chunks: more of them are ENOSPC, seen in the midst of the write."""

    def __init__(self, path: Path, num_chunks: int) -> None:
        self.path, self.num_chunks = path, num_chunks

    def on_step(self, step: str) -> None:
        if step == "chunk-write" and len(list(self.path.rglob("*.kv"))) >= self.num_chunks:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("max_bytes", [None, 1 << 30])
def test_on_a_full_disk_the_oldest_chunks_make_room(make_disk, kit, tmp_path: Path, max_bytes, caplog) -> None:
    disk = SmallDisk(tmp_path / "disk", 3)
    tier = make_disk(on_step=disk.on_step, max_bytes=max_bytes)
    for i in range(3):
        assert kit.store(tier, i).ok
    tier.touch([kit.key(0)])  # 1 is the oldest now
    for i in (3, 4):
        assert kit.store(tier, i).ok
        tier.check_integrity()
    assert [tier.contains([kit.key(i)])[0] for i in range(5)] == [True, False, False, True, True]
    assert dict(tier.take_lost()) == {kit.key(1): "evicted", kit.key(2): "evicted"}
    for i in (0, 3, 4):
        assert kit.load(tier, i)[1] == kit.payload(kit.key(i))
    assert tier.stats().is_up
    assert tier.stats().num_evicted == 2
    assert not lines(caplog)


def test_a_disk_that_others_filled_gets_one_more_try_for_each_chunk(make_disk, kit, tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "disk", 3)
    clock = FakeClock()
    tier = make_disk(on_step=disk.on_step, clock=clock)
    for i in range(3):
        kit.store(tier, i)
    disk.num_chunks = 0  # somebody else's file
    assert isinstance(kit.store(tier, 3).error, TierUnavailable)
    assert tier.stats().num_evicted == 1, "one retry, no more"
    assert not tier.stats().is_up
    tier.check_integrity()
    disk.num_chunks = 9
    clock.advance(PAUSE_S)
    kit.wait_for(lambda: (tier.poll(), tier.stats().is_up)[1], "the tier is back")
    assert kit.store(tier, 3).ok
