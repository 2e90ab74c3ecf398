"""Copies by address: runs, singles, pauses."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvferry.p2p import copying
from kvferry.p2p.copying import copy_pieces


def run(source: np.ndarray, destination: np.ndarray, rows: list[tuple[int, int, int]]) -> list[int]:
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return list(copy_pieces(table[:, 0] + source.ctypes.data, table[:, 1] + destination.ctypes.data, table[:, 2]))


def test_random_pieces_equal_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_STEP_BYTES", 5000)
    for seed in range(200):
        rng = random.Random(seed)
        source = np.random.default_rng(seed).integers(0, 256, 40_000, dtype=np.uint8)
        destination = np.zeros(40_000, np.uint8)
        rows, at = [], rng.randrange(10)
        page = rng.choice((1, 64, 100, 1000))
        while at < 30_000:
            length = page if rng.random() < 0.95 else rng.randrange(1, 3000)
            from_ = rng.randrange(0, 30_000 // page) * page + (rng.random() < 0.03)
            rows.append((from_, at, length))
            at += length + (rng.random() < 0.03) * 7
        rng.shuffle(rows)
        expected = destination.copy()
        for from_, to, length in rows:
            expected[to : to + length] = source[from_ : from_ + length]
        steps = run(source, destination, rows)
        assert np.array_equal(destination, expected), f"seed {seed}"
        assert sum(steps) == sum(length for *_, length in rows)
        assert all(step < 10_000 + max(length for *_, length in rows) for step in steps)


def test_pages_that_fill_the_destination_are_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = copying._take
    monkeypatch.setattr(copying, "_take", lambda *arguments: (calls.append(len(arguments[0])), real(*arguments)))
    source, destination = np.arange(64 * 64, dtype=np.uint16).view(np.uint8), np.zeros(64 * 128, np.uint8)
    order = random.Random(1).sample(range(64), 64)
    run(source, destination, [(128 * from_, 128 * to, 128) for to, from_ in enumerate(order)])
    assert calls == [64]
    assert np.array_equal(destination.reshape(64, 128), source.reshape(64, 128)[order])


def test_nothing_is_nothing() -> None:
    assert run(np.zeros(1, np.uint8), np.zeros(1, np.uint8), []) == []
