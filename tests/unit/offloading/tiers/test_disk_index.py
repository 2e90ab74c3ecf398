from __future__ import annotations

import pytest

from kvferry.offloading.tiers.disk_index import FOLDER_BYTES, DiskIndex, chunk_cost_bytes


@pytest.fixture
def index() -> DiskIndex:
    """A quota of 100 above the folder's own; entries a (60) and b (30), a the older one."""
    index = DiskIndex(FOLDER_BYTES + 100)
    index.add(b"a", 60)
    index.add(b"b", 30)
    return index


def always(_: bytes) -> bool:
    return True


def test_cost_is_whole_pages_and_a_share_of_the_journal() -> None:
    assert [chunk_cost_bytes(size) for size in (1, 4096, 4097)] == [4096 + 80, 4096 + 80, 8192 + 80]


def test_room_of_a_large_victim_is_not_given_away_before_it_is_deleted(index: DiskIndex) -> None:
    room = index.make_room(b"c", 20, always)
    assert [victim.entry for victim in room.victims] == [b"a"]
    assert index.used_bytes == FOLDER_BYTES + 90  # the 60 of a are still on the disk
    other = index.make_room(b"d", 20, always)
    assert [victim.entry for victim in other.victims] == [b"b"]
    index.check_integrity()
    room.victims[0].is_deleted = other.victims[0].is_deleted = True
    index.settle(room, is_written=True)
    index.settle(other, is_written=False)
    assert index.used_bytes == FOLDER_BYTES + 20
    assert list(index.entries) == [b"c"]
    index.check_integrity()


def test_what_could_not_be_deleted_comes_back(index: DiskIndex) -> None:
    index.add_quarantined("q", 10)
    room = index.make_room(b"c", 50, always)
    assert [victim.entry for victim in room.victims] == [b"a", None]
    index.settle(room, is_written=False)
    assert set(index.entries) == {b"a", b"b"}
    assert index.used_bytes == FOLDER_BYTES + 100
    index.check_integrity()


def test_no_room_changes_nothing(index: DiskIndex) -> None:
    assert index.make_room(b"c", 101, always) is None
    assert index.make_room(b"c", 50, lambda entry: entry != b"a") is None
    assert index.used_bytes == FOLDER_BYTES + 90
    index.check_integrity()


def test_quarantine_makes_room_before_any_chunk(index: DiskIndex) -> None:
    index.add_quarantined("q", 10)
    room = index.make_room(b"c", 10, always)
    assert [victim.name for victim in room.victims] == ["q"]
    index.check_integrity()


def test_a_removed_file_that_stays_counts_but_is_not_loaded(index: DiskIndex) -> None:
    victim = index.begin_removal(b"a")
    assert index.is_leaving(b"a")
    assert b"a" not in index.entries
    index.check_integrity()
    index.end_removal(victim)
    assert b"a" in index.unknown
    assert index.used_bytes == FOLDER_BYTES + 90
    index.check_integrity()
