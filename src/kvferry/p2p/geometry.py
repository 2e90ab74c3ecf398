"""What an engine tells a peer about its KV cache, and whether the KV of two engines can be mapped onto each other.

Each worker describes itself (`rank_geometry`), the engine is the sequence of its workers, and travels in the handshake:

    EngineGeometry   facts about the model, ranks
    RankGeometry     regions (backing buffers), groups, layers of one worker
    LayerGeometry    where the pages lie (`LayerLayout`), which KV heads they hold, what stands on the content dimension

All checks are made when an object is made, thus also when one is decoded: after that every byte of every block id below
`num_blocks` lies inside the regions which the peer declared, and no arithmetic on it leaves 63 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import msgspec

from kvferry.errors import ConfigError, TransferError, did_you_mean
from kvferry.layout import KVLayout, LayerLayout
from kvferry.types import AttentionKind, GroupInfo

GEOMETRY_VERSION = 1
MAX_ENCODED_BYTES = 4 << 20
REGION_BITS = 48
_MAX_COUNT = 4096  # of ranks, regions, groups, layers of a rank, heads of a layer
_MAX_PAGE_DIMENSION = 1 << 20
_MAX_TEXT = 512


class GroupGeometry(msgspec.Struct, frozen=True):
    """One KV cache group: its block size in tokens and what its layers keep."""

    block_tokens: int
    kind: AttentionKind
    window_tokens: int | None = None


class LayerGeometry(msgspec.Struct, frozen=True):
    """One layer's pages on one rank. Raises ValueError when the fields contradict each other."""

    group: int
    """Index into the rank's groups."""
    layout: LayerLayout
    heads: tuple[int, ...]
    """The model's KV head that each local head is."""
    parts: tuple[tuple[str, int], ...]
    """What stands on the content dimension, in order: (name, number of elements)."""

    def __post_init__(self) -> None:
        y = self.layout
        where = f"layer {y.name[:_MAX_TEXT]!r}: "
        _require(0 < len(y.name) <= _MAX_TEXT and len(y.dtype) <= 32, f"{where}name or dtype is empty or too long")
        _require(all(0 < n <= _MAX_PAGE_DIMENSION for n in (*y.shape, y.ratio)), f"{where}shape {y.shape}, {y.ratio=}")
        numbers = (y.offset_bytes, y.kernel_block_stride_bytes, *y.strides)
        _require(all(0 <= n < 1 << REGION_BITS for n in numbers), f"{where}offset or stride out of range: {numbers}")
        _require(0 < y.element_bytes <= 16, f"{where}element_bytes={y.element_bytes}")
        is_dense = y.shape[2] == 1 or y.strides[2] == y.element_bytes
        _require(is_dense, f"{where}content stride of {y.strides[2]} bytes, elements are {y.element_bytes}")
        _require(len(self.heads) == y.shape[0] <= _MAX_COUNT, f"{where}{len(self.heads)} heads, shape {y.shape}")
        _require(len(set(self.heads)) == len(self.heads), f"{where}a head stands twice in {self.heads}")
        _require(all(0 <= h < 1 << 16 for h in self.heads), f"{where}head numbers {self.heads} out of range")
        widths = dict(self.parts)
        _require(len(widths) == len(self.parts) <= 8, f"{where}parts {self.parts[:9]} bear one name, or are too many")
        is_whole = min(widths.values(), default=0) > 0 and sum(widths.values()) == y.shape[2]
        _require(is_whole, f"{where}parts {self.parts} are not the {y.shape[2]} elements of the content")

    def comparable(self, group: GroupGeometry) -> dict[str, str]:
        """Field -> value, of what two layers must agree on for their KV to be exchangeable."""
        window = f" of {group.window_tokens} tokens" if group.window_tokens is not None else ""
        return {
            "dtype": f"{self.layout.dtype} ({self.layout.element_bytes} bytes)",
            "content": ", ".join(f"{name} {width}" for name, width in sorted(self.parts)),
            "attention": group.kind.value + window,
        }


class RankGeometry(msgspec.Struct, frozen=True):
    """The KV cache of one worker. Raises ValueError when a block would lie outside the regions."""

    num_blocks: int
    region_bytes: tuple[int, ...]
    """Size of each backing buffer."""
    groups: tuple[GroupGeometry, ...]
    layers: tuple[LayerGeometry, ...]

    def __post_init__(self) -> None:
        _require(0 < self.num_blocks < 1 << 40, f"num_blocks={self.num_blocks}")
        for name in ("region_bytes", "groups", "layers"):
            _require(len(getattr(self, name)) <= _MAX_COUNT, f"more than {_MAX_COUNT} {name}")
        _require(all(0 < n < 1 << REGION_BITS for n in self.region_bytes), f"region_bytes={self.region_bytes[:8]}")
        for group in self.groups:
            _require(0 < group.block_tokens <= _MAX_PAGE_DIMENSION, f"block_tokens={group.block_tokens}")
            has_window = group.kind is AttentionKind.SLIDING_WINDOW
            _require(has_window == (group.window_tokens is not None), f"{group.kind} with window={group.window_tokens}")
            _require(group.window_tokens is None or 0 < group.window_tokens < 1 << 40, f"{group.window_tokens=}")
        _require(len({y.layout.name for y in self.layers}) == len(self.layers), "two layers bear one name")
        starts = {(y.group, y.layout.storage, y.layout.offset_bytes) for y in self.layers}
        _require(len(starts) == len(self.layers), "two layers of one group begin at the same byte")
        for layer in self.layers:
            self._check_place(layer)

    def _check_place(self, layer: LayerGeometry) -> None:
        y = layer.layout
        where = f"layer {y.name!r}: "
        _require(0 <= layer.group < len(self.groups), f"{where}group {layer.group} of {len(self.groups)}")
        _require(0 <= y.storage < len(self.region_bytes), f"{where}region {y.storage} of {len(self.region_bytes)}")
        block_tokens = self.groups[layer.group].block_tokens
        _require(y.ratio * y.shape[1] == block_tokens, f"{where}{y.ratio} x {y.shape[1]} tokens, {block_tokens=}")
        dims = [*zip(y.strides, y.shape, strict=True), (y.kernel_block_stride_bytes, self.num_blocks * y.ratio)]
        span = y.element_bytes
        for stride, size in sorted(dim for dim in dims if dim[1] > 1):
            _require(stride >= span, f"{where}its pages overlap themselves (stride {stride}, {span} bytes inside it)")
            span += stride * (size - 1)
        end, size = y.offset_bytes + span, self.region_bytes[y.storage]
        _require(end <= size, f"{where}ends at byte {end}, but region {y.storage} has {size} bytes")


class EngineGeometry(msgspec.Struct, frozen=True, cache_hash=True):
    """All workers of an engine, by rank. Raises ValueError when they contradict each other."""

    ranks: tuple[RankGeometry, ...]
    facts: tuple[tuple[str, str], ...] = ()
    """(name, value) of what else must be equal: weights' fingerprint, cache dtype. Names on one side only do not count."""
    version: int = GEOMETRY_VERSION

    def __post_init__(self) -> None:
        _require(0 < len(self.ranks) <= _MAX_COUNT, f"{len(self.ranks)} ranks")
        is_short = len(self.facts) <= 64 and all(len(text) <= _MAX_TEXT for fact in self.facts for text in fact)
        _require(is_short, f"more than 64 facts, or one longer than {_MAX_TEXT} characters")
        groups = self.ranks[0].groups
        seen: dict[str, dict[str, str]] = {}
        for number, rank in enumerate(self.ranks):
            _require(rank.groups == groups, f"ranks 0 and {number} have different groups")
            for layer in rank.layers:
                name, fields = layer.layout.name, layer.comparable(groups[layer.group])
                _require(seen.setdefault(name, fields) == fields, f"ranks disagree on layer {name!r}: {fields}")

    @property
    def num_blocks(self) -> int:
        """Block ids are below this on every rank."""
        return min(rank.num_blocks for rank in self.ranks)

    def layer_holders(self) -> dict[str, list[tuple[int, LayerGeometry]]]:
        """Layer name -> the (rank, layer) that hold heads of it."""
        out: dict[str, list[tuple[int, LayerGeometry]]] = {}
        for number, rank in enumerate(self.ranks):
            for layer in rank.layers:
                out.setdefault(layer.layout.name, []).append((number, layer))
        return out


def rank_geometry(
    layout: KVLayout,
    groups: Sequence[GroupInfo],
    region_bytes: Sequence[int],
    *,
    total_kv_heads: int | Mapping[str, int],
    key_elements: int | Mapping[str, int],
    tp_rank: int = 0,
    tp_size: int = 1,
) -> RankGeometry:
    """Describe this worker.

    `region_bytes`: size of each of the layout's storages. `total_kv_heads` (of the whole model) and `key_elements`
    (width of K on the content dimension, the rest is V) may differ by layer name. Raises ConfigError when the registered
    tensors do not fit these facts.
    """
    infos = {group.group_id: group for group in groups}
    try:
        layers = []
        for number, group in enumerate(layout.groups):
            for y in group.layers:
                key = _of_layer("key_elements", key_elements, y.name)
                parts = tuple(part for part in (("k", key), ("v", y.shape[2] - key)) if part[1])
                total = _of_layer("total_kv_heads", total_kv_heads, y.name)
                layers.append(LayerGeometry(number, y, _heads_of_rank(y, total, tp_rank, tp_size), parts))
        described = [(g.block_tokens, infos[g.group_id].kind, infos[g.group_id].window_tokens) for g in layout.groups]
        group_geometries = tuple(GroupGeometry(*fields) for fields in described)
        return RankGeometry(layout.num_blocks, tuple(region_bytes), group_geometries, tuple(layers))
    except ValueError as err:
        raise ConfigError(f"this KV cache cannot be described to peers: {err}") from err


def _of_layer(what: str, value: int | Mapping[str, int], name: str) -> int:
    if isinstance(value, int):
        return value
    if name not in value:
        raise ConfigError(f"{what} has no value for layer {name!r}{did_you_mean(name, value)}")
    return value[name]


def _heads_of_rank(layer: LayerLayout, total: int, tp_rank: int, tp_size: int) -> tuple[int, ...]:
    """Consecutive heads by rank; with more ranks than heads, neighbouring ranks hold the same one."""
    count = max(1, total // tp_size)
    if (total % tp_size and tp_size % total) or count != layer.shape[0]:
        raise ConfigError(
            f"layer {layer.name!r} has {layer.shape[0]} KV heads on this rank; {total} heads over {tp_size} ranks "
            f"would be {total / tp_size:g}"
        )
    first = tp_rank * total // tp_size
    return tuple(range(first, first + count))


def encode_geometry(geometry: EngineGeometry) -> bytes:
    """For the handshake."""
    return msgspec.msgpack.encode(geometry)


def decode_geometry(data: bytes) -> EngineGeometry:
    """A peer's geometry, checked. Raises TransferError when it is malformed or contradicts itself."""
    if len(data) > MAX_ENCODED_BYTES:
        raise TransferError(f"the peer's geometry has {len(data)} bytes, more than {MAX_ENCODED_BYTES}")
    try:
        return msgspec.msgpack.decode(data, type=EngineGeometry)
    except (msgspec.DecodeError, ValueError, RecursionError) as err:
        raise TransferError(f"the peer's geometry is malformed: {err}") from err


def differences(source: EngineGeometry, destination: EngineGeometry) -> list[str]:
    """Why KV of `source` cannot be put into `destination`, one readable line per field; empty when it can."""
    if source.version != destination.version:
        return [f"geometry version: source {source.version}, destination {destination.version}"]
    theirs = dict(destination.facts)
    out = [
        f"{name}: source {value}, destination {theirs[name]}"
        for name, value in source.facts
        if theirs.get(name, value) != value
    ]
    ours, theirs_by_name = _engine_layers(source), _engine_layers(destination)
    out += _missing("destination", [name for name in ours if name not in theirs_by_name])
    out += _missing("source", [name for name in theirs_by_name if name not in ours])
    found = [
        (f"{field}: source {value}, destination {theirs_by_name[name][field]}", name)
        for name in ours
        if name in theirs_by_name
        for field, value in ours[name].items()
        if theirs_by_name[name][field] != value
    ]
    out += [f"{text} ({_some(name for _, name in run)})" for text, run in groupby(sorted(found), lambda item: item[0])]
    kinds = sorted({g.kind.value for g in source.ranks[0].groups if g.kind is AttentionKind.OTHER})
    return out + [f"attention: layers of kind {kind!r} do not keep KV by tokens and cannot be moved" for kind in kinds]


def _engine_layers(engine: EngineGeometry) -> dict[str, dict[str, Any]]:
    groups = engine.ranks[0].groups
    out = {}
    for name, holders in engine.layer_holders().items():
        heads = sorted({head for _, layer in holders for head in layer.heads})
        out[name] = {"KV heads": _spans(heads), **holders[0][1].comparable(groups[holders[0][1].group])}
    return out


def _spans(numbers: Sequence[int]) -> str:
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _missing(side: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield f"layers: {side} lacks {_some(names)}"


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return repr(first) + (f" and {len(rest)} more" if rest else "")


def _require(is_met: bool, text: str) -> None:
    if not is_met:
        raise ValueError(text)
