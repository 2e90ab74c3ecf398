from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path

from kvferry.offloading.tiers.disk_journal import Journal, Use, read_order


def record(use: int, chunk_id: int) -> bytes:
    body = struct.pack("<IQ", use, chunk_id)
    return struct.pack("<I", zlib.crc32(body)) + body


def test_records_are_as_documented_and_the_last_one_counts(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    journal = Journal(path, [], None)
    journal.append([(Use.USED, 1), (Use.USED, 2), (Use.USED, 3), (Use.USED, 1)])
    journal.append([(Use.GONE, 2), (Use.USED, 4)])
    journal.close()
    journal.close()
    journal.append([(Use.USED, 9)])
    expected = [record(1, 2), record(1, 3), record(1, 1), record(2, 2), record(1, 4)]
    assert Path(path).read_bytes() == b"".join(expected)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert read_order(path) == [3, 1, 4]


def test_what_is_damaged_or_torn_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    damaged = bytearray(record(1, 1))
    damaged[4] = 2  # "1 was used" turned into "1 is gone"
    path.write_bytes(record(1, 1) + record(1, 2) + damaged + record(1, 3) + record(2, 2)[:9])
    assert read_order(str(path)) == [1, 2, 3]
    Journal(str(path), [3, 1, 7], None).close()
    assert path.read_bytes() == record(1, 1) + record(1, 3)
    assert read_order(str(tmp_path / "none")) == []


def test_it_stays_small_also_after_most_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(str(path), [], None)
    largest = 0
    for i in range(2000):
        journal.append([(Use.USED, i)])
        largest = max(largest, path.stat().st_size)
    assert largest <= 2 * 16 * 2000
    for i in range(1990):
        journal.append([(Use.GONE, i)])
    assert path.stat().st_size <= 4096
    assert read_order(str(path)) == list(range(1990, 2000))


def test_a_write_that_fails_costs_order_only(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "journal"
    journal = Journal(str(path), [], None)
    journal.append([(Use.USED, 1)])
    real = os.write

    def half(fd: int, data: bytes) -> int:
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:9])

    monkeypatch.setattr("os.write", half)
    journal.append([(Use.USED, 2)])
    monkeypatch.undo()
    journal.append([(Use.USED, 3)])
    assert path.read_bytes() == record(1, 1) + record(1, 3)
