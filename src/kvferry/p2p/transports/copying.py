"""Many small copies in one process, at memory speed, with the GIL free for long stretches.

One `memmove` per piece asks for the GIL after every piece; between copies of 16 KiB that and the call cost a third of
the speed on a quiet machine, and more beside busy threads. So runs of equal pieces that lie behind each other on one
side become one numpy call without the GIL: a gather (`take`) where that is the destination, a scatter where it is the
source. No installed library copies from scattered to scattered places in one call: a gather into a buffer and a
scatter from it were measured to be slower than the single calls, as was asking the kernel (`io_submit` on the file).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from kvferry.p2p.transports.transport import Ints

_GRID_FACTOR = 16
_MIN_ROWS = 12  # one numpy call costs more than fewer memmoves


class _Rows:
    """Memory at an address, as numpy takes it."""

    def __init__(self, address: int, num_rows: int, row_bytes: int) -> None:
        self.__array_interface__ = {
            "data": (address, False), "shape": (num_rows, row_bytes), "typestr": "|u1", "version": 3,
        }  # fmt: skip


def copy_pieces(sources: Ints, destinations: Ints, lengths: Ints, step_bytes: Callable[[], int]) -> Iterator[int]:
    """Copy `lengths` bytes each from addresses to addresses; destinations do not overlap each other or any source.

    Pauses about every `step_bytes()`, and at the end, with the number of bytes copied since.
    """
    order, bounds = _runs(destinations, sources, lengths)
    if is_scatter := len(bounds) > len(lengths) // 4:
        by_source, source_bounds = _runs(sources, destinations, lengths)
        if is_scatter := len(source_bounds) < len(bounds):
            order, bounds = by_source, source_bounds
    sources, destinations, lengths = sources[order], destinations[order], lengths[order]
    has_short = any(stop - start < _MIN_ROWS for start, stop in pairwise(bounds))
    # Lists: faster to take single addresses from, but they take a percent of the time of the copies.
    from_, to = (sources.tolist(), destinations.tolist()) if has_short else (sources, destinations)
    copied = 0
    for start, stop in pairwise(bounds):
        length = int(lengths[start])
        first = start
        while first < stop:
            step = step_bytes()
            last = min(first + max(1, step // length), stop)
            if last - first < _MIN_ROWS:
                for i in range(first, last):
                    ctypes.memmove(int(to[i]), int(from_[i]), length)
            elif is_scatter:
                _scatter(int(from_[first]), destinations[first:last], length)
            else:
                _gather(sources[first:last], int(to[first]), length)
            copied += length * (last - first)
            first = last
            if copied >= step:
                yield copied
                copied = 0
    if copied:
        yield copied


def _runs(adjacent: Ints, anywhere: Ints, lengths: Ints) -> tuple[Ints, list[int]]:
    """Pieces in the order of their `adjacent` addresses, and where runs start, and the end.

    A run is of equal lengths, adjacent on the one side and whole lengths apart on the other.
    """
    order = _order(adjacent, lengths)
    adjacent, anywhere, lengths = adjacent[order], anywhere[order], lengths[order]
    is_next = (
        (lengths[1:] == lengths[:-1])
        & (adjacent[1:] == adjacent[:-1] + lengths[:-1])
        & ((anywhere[1:] - anywhere[:-1]) % lengths[1:] == 0)
    )
    return order, [*([0] if len(lengths) else []), *(np.flatnonzero(~is_next) + 1).tolist(), len(lengths)]


def _order(addresses: Ints, lengths: Ints) -> Ints:
    """What sorts them. Addresses on a grid of one length that they fill well, as pages do, need no comparing."""
    if len(addresses):
        lowest, length = int(addresses.min()), int(lengths[0])
        cells = (addresses - lowest) // length
        num_cells = int(cells.max()) + 1
        if num_cells <= _GRID_FACTOR * len(addresses) and np.array_equal(cells * length + lowest, addresses):
            piece_in = np.full(num_cells, -1)
            piece_in[cells] = np.arange(len(cells))
            order = piece_in[piece_in >= 0]
            if len(order) == len(addresses):
                return order
    return np.argsort(addresses)


def _gather(sources: Ints, destination: int, length: int) -> None:
    pages, rows = _pages(sources, length)
    # mode="clip" writes straight into `out`; the default would go through a buffer.
    np.take(pages, rows, axis=0, out=np.asarray(_Rows(destination, len(rows), length)), mode="clip")


def _scatter(source: int, destinations: Ints, length: int) -> None:
    pages, rows = _pages(destinations, length)
    pages[rows] = np.asarray(_Rows(source, len(rows), length))


def _pages(addresses: Ints, length: int) -> tuple[np.ndarray, Ints]:
    """Memory as rows, and which of them these addresses, whole lengths apart, are."""
    lowest = int(addresses.min())
    rows = (addresses - lowest) // length
    return np.asarray(_Rows(lowest, int(rows.max()) + 1, length)), rows
