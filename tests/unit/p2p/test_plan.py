"""Plans against an element-wise copy of what hosts would register, over random pairs of engines."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from kvferry.contract.kv_cache import FullAttentionSpec, make_kv_cache_config
from kvferry.engine.kv_groups import KVBuffer
from kvferry.errors import TransferError, TransferMismatch
from kvferry.kv.layout import KVLayout
from kvferry.p2p.geometry import EngineGeometry, PageForm, RankGeometry, rank_geometry
from kvferry.p2p.plan import Pieces, RankTransfer, plan_transfer, unfilled_blocks
from kvferry.types import AttentionKind, GroupInfo

ORDERS = ["LBHNC", "LBNHC", "BLNHC", "BLHNC", "LHBNC", "BHLNC"]


@dataclass
class Model:
    """What both engines run: layer name -> window (None: full attention)."""

    windows: dict[str, int | None]
    total_heads: int
    widths: dict[str, int]

    def value(self, layer: str, token: int, head: int, part: str, element: int) -> int:
        """Unique per element."""
        numbers = (list(self.windows).index(layer), token, head, list(self.widths).index(part), element)
        out = 1
        for number, base in zip(numbers, (16, 256, 16, 4, 16), strict=True):
            out = out * base + number
        return out


@dataclass
class Worker:
    """One rank: its buffers, and the view and model heads of each layer it holds."""

    buffers: list[torch.Tensor]
    views: dict[str, torch.Tensor]
    heads: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Engine:
    """A random engine that runs a model."""

    geometry: EngineGeometry
    workers: list[Worker]
    groups: list[GroupInfo]
    parts: list[str]
    k_by_element: bool = False

    def group_of(self, layer: str) -> GroupInfo:
        """The group that holds a layer."""
        return next(g for g in self.groups if layer in g.layer_names)

    def place(self, layer: str, view: torch.Tensor, tables: list[list[int]], token: int) -> tuple[int, int, int]:
        """(block id, kernel block, row) of a token."""
        group, rows = self.group_of(layer), view.shape[2]
        block = tables[group.group_id][token // group.block_tokens]
        within = token % group.block_tokens
        return block, block * (group.block_tokens // rows) + within // rows, within % rows

    def put(
        self, model: Model, layer: str, view: torch.Tensor, at: tuple[int, int, int], what: tuple[int, int]
    ) -> None:
        """Write (token, head) of a layer at (page, local head, row), in this engine's packing."""
        page, local, row = at
        values = {p: [model.value(layer, *what, p, e) for e in range(model.widths[p])] for p in self.parts}
        if self.k_by_element:
            flat, rows, k, v = view[page, local].view(-1), view.shape[2], model.widths["k"], model.widths["v"]
            flat[row : k * rows : rows] = torch.tensor(values["k"], dtype=view.dtype)
            flat[k * rows + row * v : k * rows + (row + 1) * v] = torch.tensor(values["v"], dtype=view.dtype)
        else:
            view[page, local, row] = torch.tensor([v for p in self.parts for v in values[p]], dtype=view.dtype)


def make_views(
    rng: random.Random, names: list[str], sizes: dict[str, int], dtype: torch.dtype, order: str
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Views [B, H, N, C] of layers in a physical order, with random padding of each dimension but the content's."""
    sizes = {**sizes, "L": len(names)}
    padded = {d: n + (rng.random() < 0.2 and d != "C") for d, n in sizes.items()}
    if rng.random() < 0.2:  # a buffer per layer
        out = [make_views(rng, [name], sizes, dtype, order) for name in names] if len(names) > 1 else []
        if out:
            return [b for buffers, _ in out for b in buffers], {k: v for _, views in out for k, v in views.items()}
    shape = [padded[d] for d in order]
    lead = rng.choice([0, 0, 3])
    flat = torch.from_numpy(np.random.default_rng(rng.randrange(1 << 30)).integers(-99, 0, int(np.prod(shape)) + lead))
    flat = flat.to(dtype)
    pool = flat[lead:].view(shape).permute(*[order.index(d) for d in "LBHNC"])
    return [flat], {
        name: pool[i, : sizes["B"], : sizes["H"], : sizes["N"], : sizes["C"]] for i, name in enumerate(names)
    }


def make_groups(rng: random.Random, model: Model) -> list[GroupInfo]:
    """Layers of one window share a group, or several; any order of groups and of layers."""
    sets: list[list[str]] = []
    for window in sorted(set(model.windows.values()), key=str):
        names = [name for name, w in model.windows.items() if w == window]
        rng.shuffle(names)
        cut = rng.randrange(len(names)) if rng.random() < 0.3 else 0
        sets += [part for part in (names[:cut], names[cut:]) if part]
    rng.shuffle(sets)
    common = rng.choice([2, 4, 6, 8])
    groups = []
    for number, names in enumerate(sets):
        window = model.windows[names[0]]
        kind = AttentionKind.FULL if window is None else AttentionKind.SLIDING_WINDOW
        block_tokens = common if rng.random() < 0.7 else rng.choice([2, 4, 6, 8])
        groups.append(GroupInfo(number, tuple(names), block_tokens, kind, window))
    return groups


def make_worker(
    rng: random.Random, model: Model, groups: list[GroupInfo], num_blocks: int, heads: int, dtype: torch.dtype
) -> Worker:
    """Tensors of one rank. Groups of one block size overlay each other, as hosts do it."""
    worker = Worker([], {})
    order = rng.choice(ORDERS)
    for block_tokens in {g.block_tokens for g in groups}:
        same = [g for g in groups if g.block_tokens == block_tokens]
        ratio = rng.choice([r for r in (1, 2, 3) if block_tokens % r == 0])
        content = sum(model.widths.values())
        sizes = {"B": num_blocks * ratio, "H": heads, "N": block_tokens // ratio, "C": content}
        slots = [f"slot{i}" for i in range(max(len(g.layer_names) for g in same))]
        buffers, views = make_views(rng, slots, sizes, dtype, order)
        worker.buffers += buffers
        for group in same:
            for slot, name in zip(slots, group.layer_names, strict=False):
                worker.views[name] = views[slot]
    return worker


def describe(
    rng: random.Random, model: Model, worker: Worker, groups: list[GroupInfo], num_blocks: int, tp: tuple[int, int]
) -> RankGeometry:
    """The worker's geometry from what it registered."""
    layout, anchors = KVLayout.from_tensors(worker.views, groups, num_blocks)
    sizes = [a.untyped_storage().nbytes() for a in anchors]
    pointers = [a.untyped_storage().data_ptr() for a in anchors]
    worker.buffers.sort(key=lambda b: pointers.index(b.data_ptr()) if b.data_ptr() in pointers else len(pointers))
    geometry = rank_geometry(
        layout,
        groups,
        sizes,
        total_kv_heads=model.total_heads,
        key_elements=model.widths["k"],
        tp_rank=tp[0],
        tp_size=tp[1],
    )
    first, count = tp[0] * model.total_heads // tp[1], max(1, model.total_heads // tp[1])
    for name in worker.views:
        worker.heads[name] = list(range(first, first + count))
        if rng.random() < 0.1:
            rng.shuffle(worker.heads[name])
    return geometry


def make_engine(rng: random.Random, model: Model, dtype: torch.dtype, num_blocks: int) -> Engine:
    """Random tp and pp size, groups, block sizes, orders, packing, head order."""
    sizes = [n for n in (1, 2, 4, 8) if n % model.total_heads == 0 or model.total_heads % n == 0]
    tp_size = rng.choice(sizes)
    names = list(model.windows)
    cut = rng.randrange(1, len(names)) if len(names) > 1 and rng.random() < 0.3 else len(names)
    groups = make_groups(rng, model)
    parts = list(model.widths)
    if rng.random() < 0.2:
        parts.reverse()
    ranks, workers = [], []
    for stage in (names[:cut], names[cut:]):
        for tp_rank in range(tp_size if stage else 0):
            held = [
                GroupInfo(
                    g.group_id, tuple(n for n in g.layer_names if n in stage), g.block_tokens, g.kind, g.window_tokens
                )
                for g in groups
            ]
            worker = make_worker(rng, model, held, num_blocks, max(1, model.total_heads // tp_size), dtype)
            geometry = describe(rng, model, worker, held, num_blocks, (tp_rank, tp_size))
            ranks.append(repack(geometry, worker, [(p, model.widths[p]) for p in parts if model.widths[p]]))
            workers.append(worker)
    can_turn = parts == ["k", "v"] and model.widths["v"] > 0
    can_turn &= all(y.layout.strides[1:] == (4 * dtype.itemsize, dtype.itemsize) for r in ranks for y in r.layers)
    k_by_element = can_turn and rng.random() < 0.7
    if k_by_element:
        ranks = [_with_form(rank, PageForm.K_BY_ELEMENT) for rank in ranks]
    return Engine(EngineGeometry(tuple(ranks), (("weights", "abc"),)), workers, groups, parts, k_by_element)


def _with_form(rank: RankGeometry, form: PageForm) -> RankGeometry:
    layers = tuple(msgspec.structs.replace(layer, form=form) for layer in rank.layers)
    return msgspec.structs.replace(rank, layers=layers)


def repack(geometry: RankGeometry, worker: Worker, parts: list[tuple[str, int]]) -> RankGeometry:
    """The geometry with the worker's head order and packing, which no known host varies."""
    layers = tuple(
        msgspec.structs.replace(y, heads=tuple(worker.heads[y.layout.name]), parts=tuple(parts))
        for y in geometry.layers
    )
    return msgspec.structs.replace(geometry, layers=layers)


def allot(rng: random.Random, engine: Engine, num_tokens: int, num_blocks: int) -> list[list[int]]:
    """Block ids for every group; window groups may lack what lies before their window."""
    free = list(range(1, num_blocks))
    if rng.random() < 0.6:
        rng.shuffle(free)
    out = []
    for group in engine.groups:
        count = -(-num_tokens // group.block_tokens) + rng.choice([0, 0, 1])
        ids = [free.pop(0) for _ in range(count)]
        if group.window_tokens is not None:
            for i in range(max(0, num_tokens - group.window_tokens + 1) // group.block_tokens):
                ids[i] = 0 if rng.random() < 0.7 else ids[i]
        out.append(ids)
    return out


def fill(model: Model, engine: Engine, tables: list[list[int]], num_tokens: int) -> None:
    """Put the request's KV where the engine's block table says."""
    for worker in engine.workers:
        for layer, view in worker.views.items():
            for token in range(num_tokens):
                block, page, row = engine.place(layer, view, tables, token)
                for local, head in enumerate(worker.heads[layer]):
                    if block:
                        engine.put(model, layer, view, (page, local, row), (token, head))


def expect(
    model: Model, engines: tuple[Engine, Engine], tables: list[list[list[int]]], tokens: range
) -> tuple[list[list[bytes]], set[tuple[int, int]]]:
    """What destination buffers must hold afterwards, element by element; and the blocks left partly unwritten."""
    source, destination = engines
    kept = [[b.clone() for b in worker.buffers] for worker in destination.workers]
    unfilled = set()
    for worker in destination.workers:
        for layer, view in worker.views.items():
            group = destination.group_of(layer)
            for token in tokens:
                theirs = tables[0][source.group_of(layer).group_id][token // source.group_of(layer).block_tokens]
                block, page, row = destination.place(layer, view, tables[1], token)
                if block and not theirs:
                    unfilled.add((group.group_id, token // group.block_tokens))
                for local, head in enumerate(worker.heads[layer]):
                    if block and theirs:
                        destination.put(model, layer, view, (page, local, row), (token, head))
    expected = [[b.numpy().tobytes() for b in worker.buffers] for worker in destination.workers]
    for worker, buffers in zip(destination.workers, kept, strict=True):
        for buffer, old in zip(worker.buffers, buffers, strict=True):
            buffer.copy_(old)
    return expected, unfilled


def apply(engines: tuple[Engine, Engine], transfers: list[RankTransfer]) -> None:
    """Copy the bytes."""
    for transfer in transfers:
        p = transfer.pieces
        source, destination = (
            [b.numpy().view(np.uint8) for b in engine.workers[rank].buffers]
            for engine, rank in zip(engines, (transfer.source_rank, transfer.destination_rank), strict=True)
        )
        assert p.length.size > 0
        for row in zip(*(array.tolist() for array in columns(p)), strict=True):
            destination[row[2]][row[3] : row[3] + row[4]] = source[row[0]][row[1] : row[1] + row[4]]


def columns(p: Pieces) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """The five arrays."""
    return [p.source_region, p.source_offset, p.destination_region, p.destination_offset, p.length]


def check_pieces(transfers: list[RankTransfer]) -> int:
    """No two pieces of a destination worker overlap. Returns how many neighbours could still be merged."""
    mergeable = 0
    for rank in {t.destination_rank for t in transfers}:
        rows = []
        for t in transfers:
            if t.destination_rank == rank:
                assert all(array.dtype == np.int64 for array in columns(t.pieces))
                assert (t.pieces.length > 0).all()
                rows += [(t.source_rank, *row) for row in zip(*(a.tolist() for a in columns(t.pieces)), strict=True)]
        rows.sort(key=lambda row: row[3:5])
        for (s, sr, so, dr, do, n), (s2, sr2, so2, dr2, do2, _) in itertools.pairwise(rows):
            assert (dr, do + n) <= (dr2, do2) or dr != dr2
            mergeable += (s, sr, so + n, dr, do + n) == (s2, sr2, so2, dr2, do2)
    return mergeable


def random_model(rng: random.Random) -> Model:
    """One to four layers, up to two kinds of attention."""
    windows = {f"layer{i}": rng.choice([None, None, 5]) for i in range(rng.randint(1, 4))}
    widths = rng.choice([{"k": 2, "v": 2}, {"k": 3, "v": 1}, {"k": 4, "v": 0}])
    return Model(windows, rng.choice([1, 2, 4]), widths)


@pytest.mark.parametrize("seed", range(400))
def test_plans_move_what_an_elementwise_copy_moves(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    dtype = rng.choice([torch.int32, torch.int64])
    num_blocks = 40
    source, destination = (make_engine(rng, model, dtype, num_blocks) for _ in range(2))
    num_tokens = rng.randint(1, 21)
    start = 0 if rng.random() < 0.5 else rng.randrange(num_tokens)
    tables = [allot(rng, engine, num_tokens, num_blocks) for engine in (source, destination)]
    fill(model, source, tables[0], num_tokens)
    engines = (source, destination)
    expected, unfilled = expect(model, engines, tables, range(start, num_tokens))
    arguments = (source.geometry, destination.geometry, *tables, (start, num_tokens))
    transfers = plan_transfer(*arguments)
    assert check_pieces(transfers) == 0, f"seed {seed}"
    if rng.random() < 0.3:  # layer by layer, and each worker by itself
        whole = sum(t.num_bytes for t in transfers)
        transfers = [t for name in model.windows for t in plan_transfer(*arguments, layers={name})]
        assert sum(t.num_bytes for t in transfers) == whole
    elif rng.random() < 0.3:
        ranks = range(len(destination.workers))
        transfers = [t for rank in ranks for t in plan_transfer(*arguments, destination_rank=rank)]
    apply(engines, transfers)
    for worker, buffers in zip(destination.workers, expected, strict=True):
        for buffer, wanted in zip(worker.buffers, buffers, strict=True):
            assert buffer.numpy().tobytes() == wanted, f"seed {seed}"
    assert set(unfilled_blocks(*arguments)) == unfilled, f"seed {seed}"


def simple_engine(
    order: str = "LBNHC",
    *,
    num_layers: int = 3,
    num_blocks: int = 12,
    heads: int = 2,
    block_tokens: int = 4,
    tp_size: int = 1,
    window: int | None = None,
) -> Engine:
    """One group, no padding, all tokens of a page in one kernel block."""
    names = [f"layer{i}" for i in range(num_layers)]
    kind = AttentionKind.FULL if window is None else AttentionKind.SLIDING_WINDOW
    groups = [GroupInfo(0, tuple(names), block_tokens, kind, window)]
    workers, ranks = [], []
    for rank in range(tp_size):
        held = max(1, heads // tp_size)
        sizes = {"L": num_layers, "B": num_blocks, "H": held, "N": block_tokens, "C": 4}
        pool = torch.zeros([sizes[d] for d in order], dtype=torch.int32)
        views = dict(zip(names, pool.permute(*[order.index(d) for d in "LBHNC"]), strict=True))
        layout, _ = KVLayout.from_tensors(views, groups, num_blocks)
        size = [pool.numel() * 4]
        ranks.append(
            rank_geometry(layout, groups, size, total_kv_heads=heads, key_elements=2, tp_rank=rank, tp_size=tp_size)
        )
        first = rank * heads // tp_size
        held_heads = {name: list(range(first, first + held)) for name in names}
        workers.append(Worker([pool.view(-1)], views, held_heads))
    return Engine(EngineGeometry(tuple(ranks)), workers, groups, ["k", "v"])


@pytest.mark.parametrize("order", ORDERS)
def test_equal_layouts_with_consecutive_blocks_are_few_pieces(order: str) -> None:
    source, destination = simple_engine(order).geometry, simple_engine(order).geometry
    num_runs = {"LBHNC": 3, "LBNHC": 3, "LHBNC": 6}.get(order, 1)  # dimensions outside the blocks: L, or L and H
    (transfer,) = plan_transfer(source, destination, [[3, 4, 5]], [[7, 8, 9]], (0, 12))
    assert transfer.pieces.length.tolist() == [3 * 3 * 2 * 4 * 4 * 4 // num_runs] * num_runs
    (transfer,) = plan_transfer(source, destination, [[5, 4, 3]], [[9, 8, 7]], (0, 12))
    assert len(transfer.pieces.length) == num_runs, "a run of blocks in falling order is a run too"


def test_whole_block_first_transfer_is_one_piece_at_the_expected_place() -> None:
    geometry = simple_engine("BLNHC").geometry
    block_bytes = 3 * 2 * 4 * 4 * 4
    (transfer,) = plan_transfer(geometry, geometry, [[3, 4]], [[8, 9]], (0, 8))
    assert [a.tolist() for a in columns(transfer.pieces)] == [
        [0], [3 * block_bytes], [0], [8 * block_bytes], [2 * block_bytes],
    ]  # fmt: skip
    assert transfer.num_bytes == 2 * block_bytes


def test_a_part_of_a_block_joins_its_neighbour() -> None:
    geometry = simple_engine("LBNHC").geometry
    (transfer,) = plan_transfer(geometry, geometry, [[3, 4]], [[8, 9]], (1, 7))
    assert len(transfer.pieces.length) == 3
    assert transfer.num_bytes == 3 * 6 * 2 * 4 * 4


def test_each_copy_of_a_head_serves_some_destinations() -> None:
    """2 KV heads over 4 ranks: rank i reads from its twin. Over 4 to 2: each reads one rank."""
    four, two, one = (simple_engine(tp_size=n).geometry for n in (4, 2, 1))
    pairs = [(t.source_rank, t.destination_rank) for t in plan_transfer(four, four, [[1]], [[2]], (0, 4))]
    assert sorted(pairs) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    for engine, num_pairs in ((two, 2), (one, 2)):
        transfers = plan_transfer(four, engine, [[1]], [[2]], (0, 4))
        assert len(transfers) == num_pairs
        assert sum(t.num_bytes for t in transfers) == 3 * 2 * 4 * 4 * 4
    transfers = plan_transfer(one, four, [[1]], [[2]], (0, 4))
    assert [t.num_bytes for t in transfers] == [3 * 1 * 4 * 4 * 4] * 4
    only = plan_transfer(one, four, [[1]], [[2]], (0, 4), destination_rank=2)
    assert [(t.source_rank, t.destination_rank) for t in only] == [(0, 2)]
    assert plan_transfer(one, four, [[1]], [[2]], (0, 4), source_rank=1) == []


def test_nothing_to_move_is_no_transfer() -> None:
    geometry = simple_engine().geometry
    assert plan_transfer(geometry, geometry, [[1]], [[1]], (2, 2)) == []
    assert plan_transfer(geometry, geometry, [[]], [[]], (0, 0)) == []
    assert plan_transfer(geometry, geometry, [[1]], [[1]], (0, 4), layers=()) == []


def test_a_layer_that_does_not_exist_is_no_empty_plan() -> None:
    geometry = simple_engine().geometry
    with pytest.raises(TransferError, match=r"no layer is named 'layer9' \(did you mean 'layer2'"):
        plan_transfer(geometry, geometry, [[1]], [[1]], (0, 4), layers=("layer2", "layer9"))


@pytest.mark.parametrize(
    ("source", "destination", "tokens", "text"),
    [
        ([[1, 2]], [[1]], (0, 8), "destination group 0 has 1 blocks, 8 tokens need 2"),
        ([[1]], [[1, 2]], (0, 8), "source group 0 has 1 blocks"),
        ([[1], [2]], [[1]], (0, 4), "2 groups, its geometry has 1"),
        ([[12]], [[1]], (0, 4), "source group 0 has block ids 12..12, its cache has 12 blocks"),
        ([[1]], [[-1]], (0, 4), "destination group 0 has block ids -1..-1"),
        ([[1 << 70]], [[1]], (0, 4), "no integers"),
        ([["a"]], [[1]], (0, 4), "no integers"),
        ([[1, 2]], [[3, 3]], (0, 8), "destination block 3 stands twice"),
        ([[0]], [[1]], (0, 4), "full group are needed"),
        ([[1]], [[0]], (0, 3), "full group are needed"),
        ([[1]], [[1]], (3, 2), "token range"),
        ([[1]], [[1]], (-4, 2), "token range"),
    ],
)
def test_bad_block_ids_are_refused(source: Any, destination: Any, tokens: tuple[int, int], text: str) -> None:
    geometry = simple_engine().geometry
    with pytest.raises(TransferError, match=text):
        plan_transfer(geometry, geometry, source, destination, tokens)


def test_a_hole_inside_the_window_is_refused_and_one_before_it_is_not() -> None:
    geometry = simple_engine(window=5).geometry
    # 12 tokens, window 5: the next token attends to 8..11 and itself.
    (transfer,) = plan_transfer(geometry, geometry, [[0, 0, 4]], [[0, 0, 9]], (0, 12))
    assert transfer.num_bytes == 3 * 2 * 4 * 4 * 4
    with pytest.raises(TransferError, match=r"tokens \[9, 13\) of a sliding_window group are needed"):
        plan_transfer(geometry, geometry, [[0, 0, 0, 4]], [[0, 0, 8, 9]], (0, 13))


def test_a_block_shared_with_dropped_tokens_is_named() -> None:
    """The source dropped tokens 0..3; the destination's block 0 holds 0..7: its second half is all it gets."""
    source, destination = simple_engine(window=5).geometry, simple_engine(window=5, block_tokens=8).geometry
    arguments = (source, destination, [[0, 2]], [[3]], (0, 8))
    assert sum(t.num_bytes for t in plan_transfer(*arguments)) == 3 * 2 * 4 * 4 * 4
    assert unfilled_blocks(*arguments) == [(0, 0)]
    assert unfilled_blocks(source, destination, [[1, 2]], [[3]], (0, 8)) == []


def test_a_mismatch_is_refused_with_its_differences() -> None:
    with pytest.raises(TransferMismatch, match=r"KV heads: source 0-1, destination 0-3 \('layer0' and 2 more\)"):
        plan_transfer(simple_engine().geometry, simple_engine(heads=4).geometry, [[1]], [[1]], (0, 4))


def test_a_plan_without_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.p2p.plan.MAX_PIECES", 20)
    source, destination = simple_engine("LBHNC").geometry, simple_engine("LBNHC").geometry
    with pytest.raises(TransferError, match="cut it by layers or tokens"):
        plan_transfer(source, destination, [[1, 2]], [[1, 2]], (0, 8))
    assert plan_transfer(source, destination, [[1, 2]], [[1, 2]], (0, 8), layers={"layer1"})


@pytest.mark.parametrize(
    ("block_first_to_layer_first", "tp_sizes"), list(itertools.product([True, False], [(1, 1), (1, 2), (2, 1)]))
)
def test_between_the_embedded_engine_and_vllm_cpu(block_first_to_layer_first: bool, tp_sizes: tuple[int, int]) -> None:
    """Embedded engine: BLNHC, blocks of 16. vLLM-CPU: LBHNC, blocks of 32, K by element. As each of them registers."""
    model = Model({f"model.layers.{i}.self_attn.attn": None for i in range(3)}, 2, {"k": 4, "v": 4})
    engines = [embedded_engine(model, tp_sizes[0]), vllm_cpu_engine(model, tp_sizes[1])]
    blocks = [[[5, 3, 9, 10, 11]], [[2, 7, 4]]]
    if not block_first_to_layer_first:
        engines.reverse()
        blocks.reverse()
    source, destination = engines
    num_tokens = 70
    fill(model, source, blocks[0], num_tokens)
    expected, _ = expect(model, (source, destination), blocks, range(num_tokens))
    transfers = plan_transfer(source.geometry, destination.geometry, *blocks, (0, num_tokens))
    assert sum(t.num_bytes for t in transfers) == 3 * num_tokens * 2 * 8 * 4
    apply((source, destination), transfers)
    for worker, buffers in zip(destination.workers, expected, strict=True):
        assert [b.numpy().tobytes() for b in worker.buffers] == buffers


def host_engine(
    model: Model,
    tp_size: int,
    block_tokens: int,
    num_blocks: int,
    views_of: Callable[[int], tuple[torch.Tensor, Any]],
    form: PageForm = PageForm.CONTENT,
) -> Engine:
    """An engine of one full-attention group; `views_of(heads)` makes a rank's buffer and registered tensors."""
    groups = [GroupInfo(0, tuple(model.windows), block_tokens, AttentionKind.FULL)]
    workers, ranks = [], []
    for rank in range(tp_size):
        heads = model.total_heads // tp_size
        buffer, views = views_of(heads)
        layout, _ = KVLayout.from_tensors(views, groups, num_blocks)
        facts: dict[str, Any] = {"total_kv_heads": model.total_heads, "key_elements": model.widths["k"]}
        facts["page_form"] = lambda name: form.value
        ranks.append(rank_geometry(layout, groups, [buffer.nbytes], **facts, tp_rank=rank, tp_size=tp_size))
        held = list(range(rank * heads, rank * heads + heads))
        workers.append(Worker([buffer], views, dict.fromkeys(views, held)))
    return Engine(EngineGeometry(tuple(ranks)), workers, groups, ["k", "v"], form is PageForm.K_BY_ELEMENT)


def embedded_engine(model: Model, tp_size: int) -> Engine:
    """The embedded engine's own buffer class makes the tensors."""

    def views_of(heads: int) -> tuple[torch.Tensor, Any]:
        spec = FullAttentionSpec(
            block_size=16,
            num_kv_heads=heads,
            head_size=model.widths["k"],
            head_size_v=model.widths["v"],
            dtype=torch.float32,
        )
        buffer = KVBuffer(make_kv_cache_config(12, dict.fromkeys(model.windows, spec)), "cpu")
        return buffer.storage, buffer.views()

    return host_engine(model, tp_size, 16, 12, views_of)


def vllm_cpu_engine(model: Model, tp_size: int) -> Engine:
    """As vLLM 0.32 on CPU was seen to register: one int8 buffer, layer l at l * layer size, [B, H, N, C] contiguous.

    Its attention keeps all of a page's K as [elements, tokens], and V behind that: tests/vllm/test_p2p.py.
    """

    def views_of(heads: int) -> tuple[torch.Tensor, Any]:
        shape = (8, heads, 32, sum(model.widths.values()))
        layer_elements = 8 * heads * 32 * shape[3]
        buffer = torch.zeros(len(model.windows) * layer_elements * 4, dtype=torch.int8)
        strides = (heads * 32 * shape[3], 32 * shape[3], shape[3], 1)
        typed = buffer.view(torch.float32)
        return buffer, {
            name: torch.as_strided(typed, shape, strides, i * layer_elements) for i, name in enumerate(model.windows)
        }

    return host_engine(model, tp_size, 32, 8, views_of, PageForm.K_BY_ELEMENT)
