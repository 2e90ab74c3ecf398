"""Copies by address: runs, singles, pauses."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvferry.p2p.transports import copying
from kvferry.p2p.transports.copying import copy_pieces


def run(source: np.ndarray, destination: np.ndarray, rows: list[tuple[int, int, int]], step_bytes: int) -> list[int]:
    from_, to, lengths = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return list(copy_pieces(from_ + source.ctypes.data, to + destination.ctypes.data, lengths, lambda: step_bytes))


def gathered(rng: random.Random, page: int) -> list[tuple[int, int, int]]:
    """Pages from anywhere to places behind each other, with a few pieces and gaps of other sizes."""
    rows, at = [], rng.randrange(10)
    while at < 30_000:
        length = page if rng.random() < 0.95 else rng.randrange(1, 3000)
        from_ = rng.randrange(0, 30_000 // page) * page + (rng.random() < 0.03)
        rows.append((from_, at, length))
        at += length + (rng.random() < 0.03) * 7
    return rows


def scattered(rng: random.Random, page: int) -> list[tuple[int, int, int]]:
    """The other way round; destinations do not overlap."""
    rows, at = [], rng.randrange(10)
    for slot in rng.sample(range(30_000 // page), 20_000 // page):
        length = page if rng.random() < 0.95 else rng.randrange(1, page + 1)
        rows.append((at, slot * page + (rng.random() < 0.03) * (page - length), length))
        at += length + (rng.random() < 0.03) * 7
        if at > 35_000:
            break
    return rows


def test_random_pieces_equal_slices() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        source = np.random.default_rng(seed).integers(0, 256, 40_000, dtype=np.uint8)
        destination = np.zeros(40_000, np.uint8)
        rows = (gathered if seed % 2 else scattered)(rng, rng.choice((1, 64, 100, 1000)))
        rng.shuffle(rows)
        expected = destination.copy()
        for from_, to, length in rows:
            expected[to : to + length] = source[from_ : from_ + length]
        steps = run(source, destination, rows, 5000)
        assert np.array_equal(destination, expected), f"seed {seed}"
        assert sum(steps) == sum(length for *_, length in rows)
        assert all(step < 10_000 + max(length for *_, length in rows) for step in steps)


@pytest.mark.parametrize("filled", ["destination", "source"])
def test_pages_that_fill_one_side_are_one_call(monkeypatch: pytest.MonkeyPatch, filled: str) -> None:
    calls = []
    name = "_gather" if filled == "destination" else "_scatter"
    real = getattr(copying, name)
    monkeypatch.setattr(
        copying, name, lambda *arguments: (calls.append(max(map(np.size, arguments))), real(*arguments))
    )
    monkeypatch.setattr(copying.ctypes, "memmove", None)
    pages, filled_pages = 3 * np.random.default_rng(1).permutation(64), np.arange(64)
    from_, to = (pages, filled_pages) if filled == "destination" else (filled_pages, pages)
    source, destination = np.arange(192 * 64, dtype=np.uint16).view(np.uint8), np.zeros(192 * 128, np.uint8)
    rows = [(128 * f, 128 * t, 128) for f, t in zip(from_.tolist(), to.tolist(), strict=True)]
    run(source, destination, rows, 1 << 20)
    assert calls == [64]
    expected = np.zeros((192, 128), np.uint8)
    for f, t in zip(from_, to, strict=True):
        expected[t] = source.reshape(192, 128)[f]
    assert np.array_equal(destination.reshape(192, 128), expected)


def test_nothing_is_nothing() -> None:
    assert run(np.zeros(1, np.uint8), np.zeros(1, np.uint8), [], 1) == []


@pytest.mark.parametrize("what", ["full grid", "thin grid", "off the grid", "twice", "one", "none"])
def test_order_sorts(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = {"one": 1, "none": 0}.get(what, 500)
    cells = np.random.default_rng(1).permutation(count * (100 if what == "thin grid" else 2))[:count]
    addresses = (1 << 40) + cells * 4096
    if what == "off the grid":
        addresses[7] += 8
    if what == "twice":
        addresses[7] = addresses[8]
    expected = np.sort(addresses)
    if what in ("full grid", "one"):
        monkeypatch.setattr(copying.np, "argsort", None)  # not needed
    order = copying._order(addresses, np.full(count, 4096))
    assert sorted(order.tolist()) == list(range(count))
    np.testing.assert_array_equal(addresses[order], expected)
