"""Byte ranges against element-wise copies of the same tensors, for every physical order, ratio and group count."""

from __future__ import annotations

import ctypes
import itertools
import random

import pytest
import torch

from kvferry.errors import ConfigError
from kvferry.kv.layout import ByteRange, KVLayout, merge_adjacent
from kvferry.types import AttentionKind, GroupInfo

ORDERS = ["LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC"]


def make_pool(order: str, sizes: dict[str, int], dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A pool of random bytes in the given physical order, and its [B, H, N, C] view per layer."""
    shape = [sizes[d] for d in order]
    count = 1
    for n in shape:
        count *= n
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    pool = raw.view(dtype).view(shape)
    logical = pool.permute(*[order.index(d) for d in "LBHNC"])
    return raw, [logical[i] for i in range(sizes["L"])]


def payload_of(raw: torch.Tensor, ranges: list[ByteRange]) -> bytes:
    """Bytes of the ranges, read through raw memory."""
    return b"".join(ctypes.string_at(raw.data_ptr() + offset, length) for _, offset, length in ranges)


def expected_payload(layers: list[torch.Tensor], order: str, ratio: int, block: int) -> bytes:
    """The definition in the module's docstring, element by element through torch indexing."""
    page = [d for d in order if d in "HNC"]
    out = b""
    for layer in layers:
        for kernel_block in range(block * ratio, (block + 1) * ratio):
            view = layer[kernel_block].permute(*["HNC".index(d) for d in page])
            out += view.contiguous().view(torch.uint8).numpy().tobytes()
    return out


@pytest.mark.parametrize(
    ("order", "ratio", "dtype"),
    list(itertools.product(ORDERS, [1, 2, 4], [torch.float32, torch.bfloat16, torch.uint8])),
)
def test_ranges_are_the_blocks_bytes(order: str, ratio: int, dtype: torch.dtype) -> None:
    sizes = {"L": 3, "B": 5 * ratio, "H": 2, "N": 4, "C": 6}
    raw, layers = make_pool(order, sizes, dtype)
    names = tuple(f"layer{i}" for i in range(3))
    group = GroupInfo(0, names, 4 * ratio, AttentionKind.FULL)
    layout, anchors = KVLayout.from_tensors(dict(zip(names, layers, strict=True)), [group], 5)
    assert len(anchors) == 1
    for blocks in ([1], [4, 2], [1, 2, 3], [3, 1, 4]):
        expected = b"".join(expected_payload(layers, order, ratio, b) for b in blocks)
        got = payload_of(raw, layout.groups[0].block_ranges(blocks))
        assert got == expected, f"{order} ratio {ratio} {dtype} blocks {blocks}"
        assert len(got) == len(blocks) * layout.groups[0].block_bytes


def test_layouts_that_differ_only_in_place_share_payloads() -> None:
    sizes = {"L": 3, "B": 4, "H": 2, "N": 4, "C": 6}
    names = ("a", "b", "c")
    descriptions = {}
    for order in ORDERS:
        _, layers = make_pool(order, sizes, torch.float32)
        group = GroupInfo(0, names, 4, AttentionKind.FULL)
        layout, _ = KVLayout.from_tensors(dict(zip(names, layers, strict=True)), [group], 4)
        descriptions[order] = layout.payload_description()
    assert descriptions["LBHNC"] == descriptions["BLHNC"] == descriptions["LHBNC"] == descriptions["BHLNC"]
    assert descriptions["LBNHC"] == descriptions["BLNHC"]
    assert descriptions["LBHNC"] != descriptions["LBNHC"]


def test_block_first_merges_a_run_of_blocks_into_one_range() -> None:
    raw, layers = make_pool("BLNHC", {"L": 3, "B": 8, "H": 2, "N": 4, "C": 6}, torch.float32)
    names = ("a", "b", "c")
    group = GroupInfo(0, names, 4, AttentionKind.FULL)
    layout, _ = KVLayout.from_tensors(dict(zip(names, layers, strict=True)), [group], 8)
    block = layout.groups[0].block_bytes
    assert layout.groups[0].block_ranges([2, 3, 4]) == [ByteRange(0, 2 * block, 3 * block)]
    assert len(layout.groups[0].block_ranges([2, 4])) == 2
    assert raw.numel() == 8 * block


def test_overlaid_groups_move_only_their_own_layers() -> None:
    """Two groups share memory (as in vLLM's hybrid caches): each group's ranges cover just its layers."""
    raw = torch.randint(0, 256, (4 * 2 * 64,), dtype=torch.uint8)
    view = raw.view(4, 2, 1, 8, 8)  # block, layer slot, H, N, C
    caches = {"full0": view[:, 0], "full1": view[:, 1], "swa0": view[:, 0]}
    groups = [
        GroupInfo(0, ("full0", "full1"), 8, AttentionKind.FULL),
        GroupInfo(1, ("swa0",), 8, AttentionKind.SLIDING_WINDOW, 16),
    ]
    layout, anchors = KVLayout.from_tensors(caches, groups, 4)
    assert len(anchors) == 1
    assert layout.groups[0].block_ranges([1]) == [ByteRange(0, 128, 128)]
    assert layout.groups[1].block_ranges([1]) == [ByteRange(0, 128, 64)]
    assert layout.groups[1].block_ranges([1, 2]) == [ByteRange(0, 128, 64), ByteRange(0, 256, 64)]


def test_layers_in_storages_of_their_own() -> None:
    """One allocation per layer (other engines): ranges name the storage."""
    caches = {name: torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8) for name in "ab"}
    layout, anchors = KVLayout.from_tensors(caches, [GroupInfo(0, ("a", "b"), 4, AttentionKind.FULL)], 3)
    assert [a.data_ptr() for a in anchors] == [caches["a"].data_ptr(), caches["b"].data_ptr()]
    assert layout.groups[0].block_ranges([2, 1]) == [
        ByteRange(0, 32, 16),
        ByteRange(1, 32, 16),
        ByteRange(0, 16, 16),
        ByteRange(1, 16, 16),
    ]


def test_alias_layers_outside_the_groups_are_ignored() -> None:
    tensor = torch.zeros(3, 1, 4, 4)
    layout, _ = KVLayout.from_tensors({"a": tensor, "alias": tensor}, [GroupInfo(0, ("a",), 4, AttentionKind.FULL)], 3)
    assert [layer.name for layer in layout.groups[0].layers] == ["a"]


def test_null_block_has_no_bytes() -> None:
    layout, _ = KVLayout.from_tensors({"a": torch.zeros(3, 1, 4, 4)}, [GroupInfo(0, ("a",), 4, AttentionKind.FULL)], 3)
    with pytest.raises(ValueError, match="null block"):
        layout.groups[0].block_ranges([0, 1])


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.zeros(7, 1, 4, 4), "not a multiple"),
        (torch.zeros(6, 1, 4, 4), "block_size is 4"),
        (torch.zeros(3, 4, 4), r"shape \(3, 4, 4\)"),
        ([torch.zeros(3, 1, 4, 4)], "list"),
    ],
)
def test_unknown_shapes_are_refused_by_name(tensor: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        KVLayout.from_tensors({"layer.7": tensor}, [GroupInfo(0, ("layer.7",), 4, AttentionKind.FULL)], 3)  # type: ignore[dict-item]
    assert "layer.7" in str(caught.value)


def test_merge_adjacent_keeps_bytes_and_order() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        ranges = [ByteRange(rng.randrange(2), rng.randrange(40), rng.randrange(1, 6)) for _ in range(rng.randrange(12))]
        spread = [(r.storage, r.offset + i) for r in ranges for i in range(r.length)]
        merged = merge_adjacent(ranges)
        assert [(r.storage, r.offset + i) for r in merged for i in range(r.length)] == spread
        for first, second in itertools.pairwise(merged):
            assert (first.storage, first.offset + first.length) != (second.storage, second.offset)


def test_pages_that_kernels_order_otherwise_are_other_payloads() -> None:
    _, tensors = make_pool("BLNHC", {"B": 4, "L": 2, "H": 1, "N": 16, "C": 8}, torch.float32)
    named = dict(zip(("a", "b"), tensors, strict=True))
    groups = [GroupInfo(0, ("a", "b"), 16, AttentionKind.FULL, None)]
    plain, told, other = (
        KVLayout.from_tensors(named, groups, 4, *form)[0].payload_description()
        for form in ((), (lambda name: "content",), (lambda name: "k by element" if name == "b" else "content",))
    )
    assert plain == told
    (two_alike,), (first, second) = plain["groups"][0]["layers"], other["groups"][0]["layers"]
    assert (two_alike[0], first[0], second[0]) == (2, 1, 1)
    assert first[1] == two_alike[1]
    assert "k by element" in second[1].values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_nan_or_an_infinity_in_a_payload_is_seen(dtype: torch.dtype, layer: int) -> None:
    """Also beside layers whose bytes are no floating point numbers; all bits but the sign of which may be set."""
    names = ("a", "bytes", "c")
    shape, largest = (3, 2, 4, 6), torch.finfo(dtype).max
    caches = {
        name: torch.full(shape, 255, dtype=torch.uint8) if name == "bytes" else torch.full(shape, -largest, dtype=dtype)
        for name in names
    }
    layout, _ = KVLayout.from_tensors(caches, [GroupInfo(0, names, 4, AttentionKind.FULL)], 3)

    def is_finite() -> bool:
        pages = (caches[name][block] for block in (1, 2) for name in names)
        payload = b"".join(page.contiguous().view(torch.uint8).numpy().tobytes() for page in pages)
        return layout.groups[0].is_finite(memoryview(payload))

    assert is_finite()
    for value in (torch.nan, torch.inf, -torch.inf):
        caches[names[layer]][2, 1, 3, 5] = value
        assert not is_finite()
    caches[names[layer]][2, 1, 3, 5] = torch.finfo(dtype).smallest_normal
    assert is_finite()
