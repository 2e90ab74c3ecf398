"""(source geometry, destination geometry, block ids, token range) -> the byte copies that move the KV.

    segment   the longest run of tokens that never crosses a page on either side: gcd of both page sizes, in tokens
    grid      layers that step through memory alike on both sides: one vector of segment addresses serves them all
    template  the copies of one segment of a grid's layers, relative to the segment's addresses; cached

A plan is the outer sum of segment addresses and template, in numpy; then copies adjacent on both sides become one. The
direction is from source to destination, whoever executes it: a pull reads the source, a push writes the destination.
An address is one number: region << 50 | offset, so that copies of different regions are never adjacent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np

from kvferry.errors import TransferError, TransferMismatch, did_you_mean
from kvferry.p2p.geometry import REGION_BITS, EngineGeometry, GroupGeometry, LayerGeometry, differences
from kvferry.p2p.transports.transport import Ints, Pieces
from kvferry.types import NULL_BLOCK_ID

BlockIds = Sequence[Sequence[int]]
"""Per group; position i of a group's list holds tokens [i * block_tokens, (i + 1) * block_tokens) of the request."""

MAX_PIECES = 1 << 24
_REGION_SHIFT = REGION_BITS + 2
_SORTED_PIECES = 1 << 16  # up to here a last sort finds also those neighbours that layers and groups hide


@dataclass(frozen=True, slots=True, eq=False)
class RankTransfer:
    """What moves between two workers."""

    source_rank: int
    destination_rank: int
    pieces: Pieces

    @property
    def num_bytes(self) -> int:
        """Bytes that move."""
        return int(self.pieces.length.sum())


def plan_transfer(
    source: EngineGeometry,
    destination: EngineGeometry,
    source_blocks: BlockIds,
    destination_blocks: BlockIds,
    token_range: tuple[int, int],
    *,
    layers: Collection[str] | None = None,
    source_rank: int | None = None,
    destination_rank: int | None = None,
) -> list[RankTransfer]:
    """The copies that put tokens [start, end) of a request into its destination blocks, per pair of workers.

    `layers` limits the plan to layers of these names (for layer-wise transfers), the ranks to one worker's share. Where
    a sliding-window group has the null block on either side nothing moves; tokens that the window still needs must be
    there. Only tokens of the range are touched. Raises TransferMismatch (with `differences`) when the geometries cannot
    be mapped, TransferError when block ids are missing, out of range or stand twice, or the plan exceeds MAX_PIECES.
    """
    planner = _planner(source, destination)
    table = planner.block_table(source_blocks, destination_blocks, token_range)
    only = None if layers is None else planner.known_layers(layers)
    out = []
    for pair in planner.pairs:
        if source_rank in (None, pair[0]) and destination_rank in (None, pair[1]):
            pieces = planner.pieces(pair, only, table)
            if pieces.length.size:
                out.append(RankTransfer(*pair, pieces))
    return out


def unfilled_blocks(
    source: EngineGeometry,
    destination: EngineGeometry,
    source_blocks: BlockIds,
    destination_blocks: BlockIds,
    token_range: tuple[int, int],
) -> list[tuple[int, int]]:
    """Destination blocks (group, position) that the transfer leaves partly unwritten inside the range.

    The source has dropped tokens outside the window that share a destination block with tokens inside it, which happens
    when block sizes differ. The request itself is served, but such a block must not be found again by its content.
    """
    planner = _planner(source, destination)
    table = planner.block_table(source_blocks, destination_blocks, token_range)
    tokens = np.arange(table.start, table.end)
    out: set[tuple[int, int]] = set()
    for pair in {(grid.source.group, grid.destination.group) for grids in planner.pairs.values() for grid in grids}:
        positions = tokens // destination.ranks[0].groups[pair[1]].block_tokens
        theirs = table.source[pair[0]][tokens // source.ranks[0].groups[pair[0]].block_tokens]
        is_unfilled = (theirs == NULL_BLOCK_ID) & (table.destination[pair[1]][positions] != NULL_BLOCK_ID)
        out.update((pair[1], position) for position in np.unique(positions[is_unfilled]).tolist())
    return sorted(out)


class _Steps(NamedTuple):
    """How one side's pages follow each other."""

    group: int
    page_tokens: int
    ratio: int
    page_stride: int
    token_stride: int

    def addresses(self, tokens: Ints, block_ids: Ints) -> Ints:
        """Where the KV of tokens begins, relative to page 0."""
        block_tokens = self.page_tokens * self.ratio
        page, within = np.divmod(tokens % block_tokens, self.page_tokens)
        out: Ints = (block_ids * self.ratio + page) * self.page_stride + within * self.token_stride
        return out


class _Grid(NamedTuple):
    source: _Steps
    destination: _Steps


class _LayerPair(NamedTuple):
    """Parts of a layer on two workers: pairs of local heads, and runs (source offset, destination offset, bytes)."""

    source: LayerGeometry
    destination: LayerGeometry
    heads: tuple[tuple[int, int], ...]
    parts: tuple[tuple[int, int, int], ...]


class _Copies(NamedTuple):
    """Addresses and lengths."""

    source: Ints
    destination: Ints
    length: Ints


class _BlockTable(NamedTuple):
    """Checked block ids by group, and the token range."""

    source: list[Ints]
    destination: list[Ints]
    start: int
    end: int


class _Planner:
    """Everything about a pair of geometries that does not depend on the request."""

    def __init__(self, source: EngineGeometry, destination: EngineGeometry) -> None:
        found = differences(source, destination)
        if found:
            raise TransferMismatch("the engines' KV caches cannot be mapped: " + "; ".join(found))
        self._engines = (source, destination)
        self.pairs: dict[tuple[int, int], dict[_Grid, list[_LayerPair]]] = {}
        self._holders = sources = source.layer_holders()
        for name, holders in destination.layer_holders().items():
            for destination_rank, layer in holders:
                for source_rank, grid, pair in _layer_pairs(sources[name], layer, destination_rank):
                    self.pairs.setdefault((source_rank, destination_rank), {}).setdefault(grid, []).append(pair)
        self._template = lru_cache(maxsize=512)(self._build_template)

    def known_layers(self, names: Collection[str]) -> frozenset[str]:
        """The names as a set. Raises TransferError for one that no layer bears: its KV would silently not move."""
        for name in names:
            if name not in self._holders:
                raise TransferError(f"no layer is named {name!r}{did_you_mean(name, self._holders)}")
        return frozenset(names)

    def block_table(
        self, source_blocks: BlockIds, destination_blocks: BlockIds, token_range: tuple[int, int]
    ) -> _BlockTable:
        """Check block ids and range. Raises TransferError."""
        start, end = token_range
        if not 0 <= start <= end:
            raise TransferError(f"token range [{start}, {end}) is none")
        source = _checked_ids("source", self._engines[0], source_blocks, end)
        destination = _checked_ids("destination", self._engines[1], destination_blocks, end)
        groups = zip(destination, self._engines[1].ranks[0].groups, strict=True)
        written = np.sort(np.concatenate([ids[start // group.block_tokens :] for ids, group in groups]))
        twice = written[1:][(written[1:] == written[:-1]) & (written[1:] != NULL_BLOCK_ID)]
        if len(twice):
            raise TransferError(f"destination block {twice[0]} stands twice: two parts of the KV would be put there")
        return _BlockTable(source, destination, start, end)

    def pieces(self, pair: tuple[int, int], layers: frozenset[str] | None, table: _BlockTable) -> Pieces:
        """The copies between two workers."""
        sections = []
        for grid in self.pairs[pair]:
            for first, tokens in _sections(grid, table.start, table.end):
                template = self._template(pair, grid, layers, first)
                if len(template.length):
                    sections.append(self._outer_sum(grid, template, first, tokens, table))
        whole = _joined(sections)
        if len(whole.length) <= _SORTED_PIECES:
            whole = _sorted(whole)
        whole = _merged(whole)
        regions = [addresses >> _REGION_SHIFT for addresses in whole[:2]]
        for addresses in whole[:2]:
            addresses &= (1 << _REGION_SHIFT) - 1  # in place: the arrays are this plan's own
        return Pieces(regions[0], whole.source, regions[1], whole.destination, whole.length)

    def _build_template(
        self, pair: tuple[int, int], grid: _Grid, layers: frozenset[str] | None, tokens: tuple[int, int]
    ) -> _Copies:
        copies = []
        for y in self.pairs[pair][grid]:
            source, destination = y.source.layout, y.destination.layout
            if layers is None or source.name in layers:
                strides = [
                    (side.strides[0], steps.token_stride)
                    for side, steps in zip((source, destination), grid, strict=True)
                ]
                page = _page_copies(*strides, y.heads, y.parts, tokens)
                at = [(side.storage << _REGION_SHIFT) + side.offset_bytes for side in (source, destination)]
                copies.append(_Copies(page.source + at[0], page.destination + at[1], page.length))
        return _merged(_sorted(_joined(copies)))

    def _outer_sum(
        self, grid: _Grid, template: _Copies, within: tuple[int, int], tokens: Ints, table: _BlockTable
    ) -> _Copies:
        ids, groups = [], []
        for engine, steps, blocks in zip(self._engines, grid, (table.source, table.destination), strict=True):
            groups.append(engine.ranks[0].groups[steps.group])
            ids.append(blocks[steps.group][tokens // groups[-1].block_tokens])
        has_both = (ids[0] != NULL_BLOCK_ID) & (ids[1] != NULL_BLOCK_ID)
        if not has_both.all():
            _check_window(groups[0], tokens[~has_both] + within[1], table)
            tokens, ids = tokens[has_both], [side[has_both] for side in ids]
        if len(tokens) * len(template.length) > MAX_PIECES:
            raise TransferError(f"the plan would exceed {MAX_PIECES} pieces: cut it by layers or tokens")
        source, destination = (steps.addresses(tokens, side) for steps, side in zip(grid, ids, strict=True))
        order = np.argsort(destination)
        segments = _Copies(source[order], destination[order], np.zeros(len(order), np.int64))
        span = template.destination[-1] + template.length[-1] - template.destination[0]
        is_by_segment = bool((np.diff(segments.destination) >= span).all())  # then that order is by address
        return _sums(segments, template) if is_by_segment else _sums(template, segments)


_planner = lru_cache(maxsize=32)(_Planner)
_NOTHING = _Copies(*(np.zeros(0, np.int64) for _ in range(3)))


def _steps(layer: LayerGeometry, token_stride: int) -> _Steps:
    y = layer.layout
    return _Steps(layer.group, y.shape[1], y.ratio, y.kernel_block_stride_bytes, token_stride)


def _layer_pairs(
    holders: list[tuple[int, LayerGeometry]], layer: LayerGeometry, destination_rank: int
) -> Iterator[tuple[int, _Grid, _LayerPair]]:
    """From which worker each head comes. Of several that hold a head, destinations take turns."""
    chosen: dict[int, list[tuple[int, int]]] = {}
    by_rank = dict(holders)
    for local, head in enumerate(layer.heads):
        candidates = [rank for rank, held in holders if head in held.heads]
        rank = candidates[destination_rank % len(candidates)]
        chosen.setdefault(rank, []).append((by_rank[rank].heads.index(head), local))
    for rank, heads in chosen.items():
        for grid, runs in _runs_of_a_token(by_rank[rank], layer).items():
            yield rank, grid, _LayerPair(by_rank[rank], layer, tuple(heads), tuple(runs))


def _runs_of_a_token(source: LayerGeometry, destination: LayerGeometry) -> dict[_Grid, list[tuple[int, int, int]]]:
    """Whole parts where elements are adjacent on both sides, else element by element; by how tokens step."""
    size = source.layout.element_bytes
    sources = source.placed_parts()
    out: dict[_Grid, list[tuple[int, int, int]]] = {}
    for name, b in destination.placed_parts().items():
        a = sources[name]
        length = size * b.width if a.element_stride == b.element_stride == size else size
        runs = out.setdefault(_Grid(_steps(source, a.token_stride), _steps(destination, b.token_stride)), [])
        for i in range(size * b.width // length):
            runs.append((a.offset + i * a.element_stride, b.offset + i * b.element_stride, length))
    return out


@lru_cache(maxsize=512)
def _page_copies(
    source_strides: tuple[int, int],
    destination_strides: tuple[int, int],
    heads: tuple[tuple[int, int], ...],
    parts: tuple[tuple[int, int, int], ...],
    tokens: tuple[int, int],
) -> _Copies:
    """Tokens [first, last) of a page, relative to the page on both sides."""
    token = np.arange(*tokens, dtype=np.int64)[:, None]
    head, part = np.array(heads, np.int64)[:, None, None, :], np.array(parts, np.int64)
    sides = [
        head[..., i] * strides[0] + token * strides[1] + part[:, i]
        for i, strides in enumerate((source_strides, destination_strides))
    ]
    length = np.broadcast_to(part[:, 2], sides[0].shape)
    return _merged(_sorted(_Copies(sides[0].ravel(), sides[1].ravel(), length.ravel())))


def _sections(grid: _Grid, start: int, end: int) -> Iterator[tuple[tuple[int, int], Ints]]:
    """Cut a range into whole segments and what is left: (tokens [first, last) of a segment, where segments begin)."""
    step = gcd(grid.source.page_tokens, grid.destination.page_tokens)
    first_whole = min(-(-start // step) * step, end)
    last_whole = max(end // step * step, first_whole)
    for first, last in ((start, first_whole), (first_whole, last_whole), (last_whole, end)):
        if first < last and (first % step or last % step):
            begin = first // step * step
            yield (first - begin, last - begin), np.array([begin])
        elif first < last:
            yield (0, step), np.arange(first, last, step)


def _checked_ids(side: str, engine: EngineGeometry, blocks: BlockIds, num_tokens: int) -> list[Ints]:
    groups = engine.ranks[0].groups
    if len(blocks) != len(groups):
        raise TransferError(f"{side} block ids are of {len(blocks)} groups, its geometry has {len(groups)}")
    out = []
    for number, (group, group_blocks) in enumerate(zip(groups, blocks, strict=True)):
        where = f"{side} group {number}"
        needed = -(-num_tokens // group.block_tokens)
        if len(group_blocks) < needed:
            raise TransferError(f"{where} has {len(group_blocks)} blocks, {num_tokens} tokens need {needed}")
        try:
            ids = np.array(group_blocks[:needed], dtype=np.int64)
        except (OverflowError, TypeError, ValueError) as err:
            raise TransferError(f"{where} holds block ids that are no integers: {err}") from err
        if needed and not (ids.min() >= 0 and ids.max() < engine.num_blocks):
            raise TransferError(
                f"{where} has block ids {ids.min()}..{ids.max()}, its cache has {engine.num_blocks} blocks"
            )
        out.append(ids)
    return out


def _check_window(group: GroupGeometry, ends: Ints, table: _BlockTable) -> None:
    """`ends` of segments for which a side has the null block: none may hold a token that the next one attends to."""
    needed = table.start
    if group.window_tokens is not None:
        needed = max(needed, table.end - group.window_tokens + 1)
    if ends.max() > needed:
        raise TransferError(
            f"tokens [{needed}, {table.end}) of a {group.kind.value} group are needed, "
            f"but some before {ends.max()} have the null block on one side"
        )


def _sums(rows: _Copies, columns: _Copies) -> _Copies:
    """Every row plus every column, row after row."""
    return _Copies(*((r[:, None] + c).ravel() for r, c in zip(rows, columns, strict=True)))


def _joined(sections: list[_Copies]) -> _Copies:
    if len(sections) < 2:
        return sections[0] if sections else _NOTHING
    return _Copies(*(np.concatenate(arrays) for arrays in zip(*sections, strict=True)))


def _sorted(copies: _Copies) -> _Copies:
    if (copies.destination[1:] >= copies.destination[:-1]).all():
        return copies
    order = np.argsort(copies.destination, kind="stable")
    return _Copies(*(array[order] for array in copies))


def _merged(copies: _Copies) -> _Copies:
    """The same bytes, with neighbours that are adjacent on both sides made one."""
    source, destination, length = copies
    if len(length) < 2:
        return copies
    is_first = np.empty(len(length), dtype=bool)
    is_first[0] = True
    end = source[:-1] + length[:-1]
    np.not_equal(source[1:], end, out=is_first[1:])
    np.add(destination[:-1], length[:-1], out=end)
    is_first[1:] |= destination[1:] != end
    at = np.flatnonzero(is_first)
    if len(at) == len(length):
        return copies
    return _Copies(source[at], destination[at], np.add.reduceat(length, at))
