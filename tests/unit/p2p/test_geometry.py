"""Geometries: made from what hosts register, sent to peers, compared; hostile ones are refused."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch

from kvferry.errors import ConfigError, TransferError
from kvferry.kv.layout import KVLayout
from kvferry.p2p.geometry import (
    MAX_ENCODED_BYTES,
    EngineGeometry,
    RankGeometry,
    check_geometries,
    decode_geometry,
    differences,
    encode_geometry,
    rank_geometry,
)
from kvferry.types import AttentionKind, GroupInfo


def make_rank(
    *, num_layers: int = 3, heads: int = 2, window: int | None = None, block_tokens: int = 4, **facts: Any
) -> RankGeometry:
    """A worker with one group of blocks, content of 4 + 4 float32."""
    names = tuple(f"layer{i}" for i in range(num_layers))
    kind = AttentionKind.FULL if window is None else AttentionKind.SLIDING_WINDOW
    group = GroupInfo(0, names, block_tokens, facts.pop("kind", kind), window)
    dtype = facts.pop("dtype", torch.float32)
    pool = torch.zeros((num_layers, 6, heads, block_tokens, facts.pop("content", 8)), dtype=dtype)
    layout, _ = KVLayout.from_tensors(dict(zip(names, pool, strict=True)), [group], 6)
    defaults = {"total_kv_heads": heads, "key_elements": 4}
    return rank_geometry(layout, [group], [pool.nbytes], **{**defaults, **facts})


def make(*facts: tuple[str, str], **options: Any) -> EngineGeometry:
    """An engine of one worker."""
    return EngineGeometry((make_rank(**options),), facts)


def test_a_geometry_survives_the_wire() -> None:
    geometry = EngineGeometry(
        tuple(make_rank(heads=1, total_kv_heads=2, tp_rank=r, tp_size=2, window=9) for r in range(2)), (("a", "b"),)
    )
    assert decode_geometry(encode_geometry(geometry)) == geometry
    assert [rank.layers[0].heads for rank in geometry.ranks] == [(0,), (1,)]
    assert msgspec.msgpack.decode(encode_geometry(geometry))["ranks"][0]["layers"][0]["parts"] == [["k", 4], ["v", 4]]


@pytest.mark.parametrize(
    ("total", "tp_size", "held", "heads"),
    [
        (8, 1, 8, [range(8)]),
        (8, 4, 2, [range(2), range(2, 4), range(4, 6), range(6, 8)]),
        (2, 4, 1, [[0], [0], [1], [1]]),
        (1, 3, 1, [[0], [0], [0]]),
    ],
)
def test_heads_by_rank(total: int, tp_size: int, held: int, heads: list[Any]) -> None:
    ranks = [make_rank(heads=held, total_kv_heads=total, tp_rank=r, tp_size=tp_size) for r in range(tp_size)]
    assert [list(rank.layers[0].heads) for rank in ranks] == [list(h) for h in heads]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"total_kv_heads": 3}, "has 2 KV heads on this rank; 3 heads over 1 ranks"),
        ({"total_kv_heads": 3, "tp_size": 2, "heads": 1}, "3 heads over 2 ranks would be 1.5"),
        ({"key_elements": 9}, "parts"),
        ({"key_elements": {"layer0": 4, "layer1": 4}}, r"key_elements has no value for layer 'layer2'"),
    ],
)
def test_facts_that_do_not_fit_the_tensors_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make(**options)


def test_a_key_of_the_configuration_on_one_side_counts_where_equal_code_made_both() -> None:
    ours = make(("hf_config.made_by", "A 1"), ("hf_config.a", "1"))
    theirs = make(("hf_config.made_by", "A 1"), ("hf_config.a", "1"), ("hf_config.rope", "2"), ("elsewhere", "3"))
    assert differences(ours, theirs) == ["hf_config.rope: source nothing, destination 2"]
    assert differences(theirs, ours) == ["hf_config.rope: source 2, destination nothing"]
    for maker in ("A 2", "B 1"):
        others = make(("hf_config.made_by", maker), ("hf_config.a", "1"), ("hf_config.rope", "2"))
        assert differences(ours, others) == []
        others = make(("hf_config.made_by", maker), ("hf_config.a", "7"), ("hf_config.rope", "2"))
        assert differences(ours, others) == ["hf_config.a: source 1, destination 7"]


def test_of_many_differences_as_many_are_named_as_a_message_holds() -> None:
    ours, theirs = (make(*((f"fact {i:04}", value) for i in range(900))) for value in "12")
    found = check_geometries(encode_geometry(ours), encode_geometry(theirs), True)
    assert found[0] == "fact 0000: peer 2, here 1"
    assert (len(found), found[-1]) == (33, "and 868 other differences")


def test_equal_and_mappable_geometries_have_no_differences() -> None:
    assert differences(make(), make()) == []
    assert differences(make(("weights", "abc")), make(("other", "x"))) == [], "a fact one side does not tell"
    halves = tuple(make_rank(heads=1, total_kv_heads=2, tp_rank=r, tp_size=2) for r in range(2))
    assert differences(make(), EngineGeometry(halves)) == differences(EngineGeometry(halves), make()) == []


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        (
            make(dtype=torch.float32),
            make(dtype=torch.int32),
            ["dtype: source float32 (4 bytes), destination int32 (4 bytes) ('layer0' and 2 more)"],
        ),
        (make(), make(heads=4), ["KV heads: source 0-1, destination 0-3 ('layer0' and 2 more)"]),
        (make(), make(key_elements=5), ["content: source k 4, v 4, destination k 5, v 3 ('layer0' and 2 more)"]),
        (
            make(key_elements=8),
            make(content=9, key_elements=9),
            ["content: source k 8, destination k 9 ('layer0' and 2 more)"],
        ),
        (make(num_layers=2), make(), ["layers: source lacks 'layer2'"]),
        (make(num_layers=4), make(num_layers=2), ["layers: destination lacks 'layer2' and 1 more"]),
        (
            make(),
            make(window=8),
            ["attention: source full, destination sliding_window 8 ('layer0' and 2 more)"],
        ),
        (
            make(window=8),
            make(window=9),
            ["attention: source sliding_window 8, destination sliding_window 9 ('layer0' and 2 more)"],
        ),
        (
            make(kind=AttentionKind.OTHER),
            make(kind=AttentionKind.OTHER),
            ["attention: source has layers that do not keep KV by tokens (kind 'other')"],
        ),
        (make(("weights", "abc")), make(("weights", "abd")), ["weights: source abc, destination abd"]),
        (msgspec.structs.replace(make(), version=2), make(heads=4), ["geometry version: source 2, destination 1"]),
    ],
)
def test_differences(source: EngineGeometry, destination: EngineGeometry, expected: list[str]) -> None:
    assert differences(source, destination) == expected
    assert len(differences(destination, source)) == len(expected)


def test_all_differences_are_told_at_once() -> None:
    found = differences(make(("a", "1"), num_layers=2), make(("a", "2"), heads=4, dtype=torch.float16))
    assert [line.partition(":")[0] for line in found] == ["a", "layers", "KV heads", "dtype"]


HOSTILE: list[tuple[tuple[Any, ...], Any, str]] = [
    (("num_blocks",), -1, "num_blocks"),
    (("num_blocks",), 7, "ends at byte"),
    (("num_blocks",), 1 << 47, "ends at byte"),
    (("region_bytes", 0), 100, "ends at byte"),
    (("region_bytes", 0), -5, "region_bytes"),
    (("region_bytes", 0), 1 << 60, "region_bytes"),
    (("region_bytes",), [1] * 5000, "region_bytes"),
    (("groups",), [], "groups"),
    (("groups", 0, "block_tokens"), 0, "block_tokens"),
    (("groups", 0, "block_tokens"), 8, "1 x 4 tokens, block_tokens=8"),
    (("groups", 0, "window_tokens"), 8, "window_tokens=8"),
    (("groups", 0, "kind"), "sliding_window", "window_tokens=None"),
    (("groups", 0, "kind"), "magic", "magic"),
    (("layers", 0, "group"), 1, "group 1 of 1"),
    (("layers", 0, "group"), -1, "group -1"),
    (("layers", 0, "heads"), [0], "heads"),
    (("layers", 0, "heads"), [1, 1], "heads"),
    (("layers", 0, "heads"), [0, 1 << 30], "heads"),
    (("layers", 0, "parts"), [["k", 4]], "parts"),
    (("layers", 0, "parts"), [], "parts"),
    (("layers", 0, "parts"), [["k", 4], ["k", 4]], "parts"),
    (("layers", 0, "parts"), [["k", 12], ["v", -4]], "parts"),
    (("layers", 0, "layout", "name"), "layer1", "one name"),
    (("layers", 0, "layout", "name"), "x" * 600, "too long"),
    (("layers", 1, "layout", "offset_bytes"), 0, "begin at the same byte"),
    (("layers", 0, "layout", "offset_bytes"), -4, "out of range"),
    (("layers", 2, "layout", "offset_bytes"), 1 << 40, "ends at byte"),
    (("layers", 0, "layout", "storage"), 1, "region 1 of 1"),
    (("layers", 0, "layout", "storage"), -1, "region -1"),
    (("layers", 0, "layout", "kernel_block_stride_bytes"), 0, "overlap themselves"),
    (("layers", 0, "layout", "strides"), [0, 32, 4], "overlap themselves"),
    (("layers", 0, "layout", "strides"), [128, 16, 4], "overlap themselves"),
    (("layers", 0, "layout", "strides"), [128, 32, 8], "content stride 8"),
    (("layers", 0, "layout", "strides"), [-128, 32, 4], "out of range"),
    (("layers", 0, "layout", "shape"), [2, 4, 0], "shape"),
    (("layers", 0, "layout", "shape"), [2, 1 << 40, 8], "shape"),
    (("layers", 0, "layout", "ratio"), 0, "ratio"),
    (("layers", 0, "layout", "ratio"), 1 << 62, "ratio"),
    (("layers", 0, "layout", "element_bytes"), 0, "element_bytes"),
    (("layers", 0, "layout", "element_bytes"), "4", "element_bytes"),
]


@pytest.mark.parametrize(("path", "value", "text"), HOSTILE)
def test_hostile_geometries_are_refused(path: tuple[Any, ...], value: Any, text: str) -> None:
    plain = msgspec.msgpack.decode(encode_geometry(make()))
    target = plain["ranks"][0]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(TransferError, match="geometry is malformed") as caught:
        decode_geometry(msgspec.msgpack.encode(plain))
    assert text in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_ranks_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="ranks disagree on layer 'layer0'"):
        EngineGeometry((make_rank(), make_rank(dtype=torch.int32)))
    with pytest.raises(ValueError, match="different groups"):
        EngineGeometry((make_rank(), make_rank(window=8)))


def test_bytes_that_are_no_geometry_are_refused() -> None:
    data = encode_geometry(make())
    rng = random.Random(5)
    for junk in (b"", b"\xff", b"\xdd\xff\xff\xff\xff", b"\x91" * 100_000, data[:-1], b"x" * (MAX_ENCODED_BYTES + 1)):
        with pytest.raises(TransferError, match="peer's geometry"):
            decode_geometry(junk)
    for _ in range(3000):  # flipped bytes: another geometry that holds together, or TransferError
        broken = bytearray(data)
        broken[rng.randrange(len(data))] = rng.randrange(256)
        try:
            decoded = decode_geometry(bytes(broken))
        except TransferError:
            continue
        assert all(isinstance(line, str) for line in differences(decoded, make()))


def test_the_handshake_compares_encoded_geometries() -> None:
    ours = encode_geometry(make())
    assert check_geometries(ours, ours, False) == check_geometries(ours, ours, True) == []
    heads = encode_geometry(make(heads=4))
    assert check_geometries(ours, heads, False)[0].startswith("KV heads: here 0-1, peer 0-3")
    assert check_geometries(ours, heads, True)[0].startswith("KV heads: peer 0-3, here 0-1")
    (line,) = check_geometries(ours, ours[:-3], False)
    assert line.startswith("the peer's geometry is malformed")


def test_blocks_that_the_prefill_engine_drops_are_whole_blocks_of_the_other() -> None:
    short, long = (encode_geometry(make(window=9, block_tokens=tokens)) for tokens in (4, 8))
    assert check_geometries(long, short, False) == check_geometries(short, long, True) == []
    (line,) = check_geometries(short, long, False)
    assert line == (
        "block size of layers with a window: here 4, peer 8; the first, which prefills, must have a multiple of the "
        "other's ('layer0' and 2 more)"
    )
    assert check_geometries(long, short, True)[0].startswith("block size of layers with a window: peer 4, here 8")
    short, long = (encode_geometry(make(block_tokens=tokens)) for tokens in (4, 8))
    assert check_geometries(short, long, False) == [], "without a window nothing is dropped"


def test_a_form_of_pages_that_cannot_be_handed_over_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"layer 'layer0'.* of vLLM's amx kernels, .*start vLLM with --dtype float32"):
        make(page_form=lambda name: "of vLLM's amx kernels")
