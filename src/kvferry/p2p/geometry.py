"""What an engine tells a peer about its KV cache, and whether the KV of two engines can be mapped onto each other.

Each worker describes itself (`rank_geometry`), the engine is the sequence of its workers, and travels in the handshake:

    EngineGeometry   facts about the model, ranks
    RankGeometry     regions (backing buffers), groups, layers of one worker
    LayerGeometry    where the pages lie (`LayerLayout`), which KV heads they hold, what stands on the content dimension

All checks are made when an object is made, thus also when one is decoded: after that every byte of every block id below
`num_blocks` lies inside the regions which the peer declared, and no arithmetic on it leaves 63 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import groupby
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from kvferry.contract.identity import CONFIG_MAKER
from kvferry.errors import ConfigError, TransferError, did_you_mean
from kvferry.kv.layout import KVLayout, LayerLayout
from kvferry.types import AttentionKind, GroupInfo

GEOMETRY_VERSION = 1
REGION_BITS = 48
MAX_ENCODED_BYTES = 1 << 20
_Size = Annotated[int, Meta(ge=1, lt=1 << REGION_BITS)]
_PageSize = Annotated[int, Meta(ge=1, le=1 << 20)]
_Text = Annotated[str, Meta(max_length=512)]
_MAX_PAGE_DIMENSION, _MAX_COUNT, _MAX_FACTS = 1 << 20, 1 << 12, 1 << 10
_MAX_REASONS = 32


class GroupGeometry(msgspec.Struct, frozen=True):
    """One KV cache group: its block size in tokens and what its layers keep."""

    block_tokens: _PageSize
    kind: AttentionKind
    window_tokens: _Size | None = None

    def __post_init__(self) -> None:
        has_window = self.kind is AttentionKind.SLIDING_WINDOW
        _require(has_window == (self.window_tokens is not None), f"{self.kind} with window_tokens={self.window_tokens}")


class PageForm(Enum):
    """How a head's tokens and elements stand within a page of the layout's [H, N, C]."""

    CONTENT = "content"  # as the dimensions say: each token's parts one after another
    K_BY_ELEMENT = "k by element"  # all of K as [elements, tokens], then all of V as [tokens, elements]


def _form_of(layer: str, form: str) -> PageForm:
    if form not in {known.value for known in PageForm}:
        raise ConfigError(
            f"layer {layer!r}: its KV lies in the form {form}, which cannot be handed over; on a CPU with AMX vLLM "
            "takes it for 16-bit KV, its default: start vLLM with --dtype float32"
        )
    return PageForm(form)


class PlacedPart(NamedTuple):
    """Elements of a part, and in bytes: where it begins, from token to token, from element to element."""

    width: int
    offset: int
    token_stride: int
    element_stride: int


class LayerGeometry(msgspec.Struct, frozen=True):
    """One layer's pages on one rank. Raises ValueError when the fields contradict each other."""

    group: int
    """Index into the rank's groups."""
    layout: LayerLayout
    heads: tuple[Annotated[int, Meta(ge=0, lt=_MAX_COUNT)], ...]
    """The model's KV head that each local head is."""
    parts: tuple[tuple[_Text, _PageSize], ...]
    """What stands on the content dimension, in order: (name, number of elements)."""
    form: PageForm = PageForm.CONTENT

    def __post_init__(self) -> None:
        y = self.layout
        where = f"layer {y.name[:512]!r}: "
        _require(len(y.name) <= 512 and len(y.dtype) <= 32, f"{where}name or dtype too long")
        sizes, numbers = (*y.shape, y.ratio), (y.offset_bytes, y.kernel_block_stride_bytes, *y.strides)
        _require(all(0 < n <= _MAX_PAGE_DIMENSION for n in sizes), f"{where}shape {y.shape}, ratio {y.ratio}")
        _require(all(0 <= n < 1 << REGION_BITS for n in numbers), f"{where}offset or stride out of range: {numbers}")
        is_dense = y.shape[2] == 1 or y.strides[2] == y.element_bytes
        _require(is_dense and 0 < y.element_bytes <= 16, f"{where}{y.element_bytes=}, content stride {y.strides[2]}")
        is_whole = len(self.heads) == len(set(self.heads)) == y.shape[0] <= _MAX_COUNT
        _require(is_whole, f"{where}heads {self.heads[:9]} are not {y.shape[0]} different ones")
        widths = dict(self.parts)
        is_whole = len(widths) == len(self.parts) <= 8 and sum(widths.values()) == y.shape[2]
        _require(is_whole and min(widths.values()) > 0, f"{where}parts {self.parts[:9]}, content {y.shape[2]} elements")
        is_dense = y.strides[1:] == (y.shape[2] * y.element_bytes, y.element_bytes)
        is_fit = self.form is PageForm.CONTENT or (is_dense and [*widths] == ["k", "v"])
        _require(is_fit, f"{where}{self.form} with strides {y.strides}, parts {self.parts[:9]}")

    def placed_parts(self) -> dict[str, PlacedPart]:
        """Name -> where it stands within a page, from the head's first byte."""
        y, out = self.layout, {}
        begin = 0
        for name, width in self.parts:
            if self.form is PageForm.CONTENT:
                place = begin, y.strides[1], y.element_bytes
            elif name == "k":
                place = 0, y.element_bytes, y.shape[1] * y.element_bytes
            else:
                place = begin * y.shape[1], width * y.element_bytes, y.element_bytes
            out[name] = PlacedPart(width, *place)
            begin += width * y.element_bytes
        return out

    def comparable(self, group: GroupGeometry) -> dict[str, str]:
        """Field -> value, of what two layers must agree on for their KV to be exchangeable."""
        window = "" if group.window_tokens is None else f" {group.window_tokens}"
        return {
            "dtype": f"{self.layout.dtype} ({self.layout.element_bytes} bytes)",
            "content": ", ".join(f"{name} {width}" for name, width in sorted(self.parts)),
            "attention": group.kind.value + window,
        }


class RankGeometry(msgspec.Struct, frozen=True):
    """The KV cache of one worker. Raises ValueError when a block would lie outside the regions."""

    num_blocks: _Size
    region_bytes: Annotated[tuple[_Size, ...], Meta(max_length=_MAX_COUNT)]
    """Size of each backing buffer."""
    groups: Annotated[tuple[GroupGeometry, ...], Meta(min_length=1, max_length=_MAX_COUNT)]
    layers: Annotated[tuple[LayerGeometry, ...], Meta(max_length=_MAX_COUNT)]

    def __post_init__(self) -> None:
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

    ranks: Annotated[tuple[RankGeometry, ...], Meta(min_length=1, max_length=_MAX_COUNT)]
    facts: Annotated[tuple[tuple[_Text, _Text], ...], Meta(max_length=_MAX_FACTS)] = ()
    """(name, value) of what else must be equal, as the weights' fingerprint. A name on one side only does not count,
    but for the keys of the model's configuration, "hf_config.*", where equal code (CONFIG_MAKER) resolved both."""
    version: int = GEOMETRY_VERSION

    def __post_init__(self) -> None:
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
    page_form: Callable[[str], str] = lambda name: PageForm.CONTENT.value,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> RankGeometry:
    """Describe this worker.

    `region_bytes`: size of each of the layout's storages. `total_kv_heads` (of the whole model) and `key_elements`
    (width of K on the content dimension, the rest is V) may differ by layer name; `page_form` answers a PageForm's
    value for one. Raises ConfigError when what was registered does not fit, or a page's form is not known.
    """
    infos = {group.group_id: group for group in groups}
    try:
        layers = []
        for number, group in enumerate(layout.groups):
            for y in group.layers:
                key = _of_layer("key_elements", key_elements, y.name)
                parts = tuple(part for part in (("k", key), ("v", y.shape[2] - key)) if part[1])
                total = _of_layer("total_kv_heads", total_kv_heads, y.name)
                heads = _heads_of_rank(y, total, tp_rank, tp_size)
                layers.append(LayerGeometry(number, y, heads, parts, _form_of(y.name, page_form(y.name))))
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


def check_geometries(
    local: bytes, remote: bytes, is_from_remote: bool, sides: tuple[str, str] = ("here", "peer")
) -> list[str]:
    """`differences` and `misfits` of two encoded geometries, the source's first unless KV comes from the remote one.

    One that cannot be read is a difference too. `sides`: what to call the local and the remote engine.
    """
    try:
        engines = decode_geometry(local), decode_geometry(remote)
    except TransferError as err:
        return [str(err)]
    if is_from_remote:
        engines, sides = engines[::-1], sides[::-1]
    found = differences(*engines, sides) or misfits(*engines, sides)
    rest = len(found) - _MAX_REASONS
    return [*found[:_MAX_REASONS], f"and {rest} other differences"] if rest > 0 else found


def differences(
    source: EngineGeometry, destination: EngineGeometry, sides: tuple[str, str] = ("source", "destination")
) -> list[str]:
    """Why KV of `source` cannot be put into `destination`, one readable line per field; empty when it can."""
    a, b = sides
    if source.version != destination.version:
        return [f"geometry version: {a} {source.version}, {b} {destination.version}"]
    out = [f"{name}: {a} {value}, {b} {other}" for name, value, other in _other_facts(source, destination)]
    ours, others = _engine_layers(source), _engine_layers(destination)
    for side, missing in ((a, others.keys() - ours.keys()), (b, ours.keys() - others.keys())):
        out += [f"layers: {side} lacks {_some(sorted(missing))}"] if missing else []
    found = [
        (f"{field}: {a} {value}, {b} {others[name][field]}", name)
        for name in ours.keys() & others.keys()
        for field, value in ours[name].items()
        if others[name][field] != value
    ]
    out += [f"{text} ({_some(name for _, name in run)})" for text, run in groupby(sorted(found), lambda item: item[0])]
    has_other = any(group.kind is AttentionKind.OTHER for group in source.ranks[0].groups)
    return out + [f"attention: {a} has layers that do not keep KV by tokens (kind 'other')"] * has_other


def _other_facts(source: EngineGeometry, destination: EngineGeometry) -> Iterator[tuple[str, str, str]]:
    ours, theirs = dict(source.facts), dict(destination.facts)
    names = (ours.keys() & theirs.keys()) - {CONFIG_MAKER}
    if CONFIG_MAKER in ours and ours[CONFIG_MAKER] == theirs.get(CONFIG_MAKER):
        names |= {name for name in ours.keys() | theirs.keys() if name.startswith("hf_config.")}
    for name in sorted(names):
        value, other = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if value != other:
            yield name, value, other


def misfits(source: EngineGeometry, destination: EngineGeometry, sides: tuple[str, str]) -> list[str]:
    """Why KV of `source` could be put into `destination` for some requests only; of two without `differences`.

    The source drops whole blocks behind a window. Where its blocks are not made of whole blocks of the destination's,
    one of those would be filled in part, and found again as a whole in the prefix cache.
    """
    theirs = destination.layer_holders()
    found = []
    for name, [(_, layer), *_] in source.layer_holders().items():
        group, other = source.ranks[0].groups[layer.group], destination.ranks[0].groups[theirs[name][0][1].group]
        if group.window_tokens is not None and group.block_tokens % other.block_tokens:
            found.append((group.block_tokens, other.block_tokens, name))
    return [
        f"block size of layers with a window: {sides[0]} {ours}, {sides[1]} {others}; the first, which prefills, must "
        f"have a multiple of the other's ({_some(name for *_, name in run)})"
        for (ours, others), run in groupby(sorted(found), lambda item: item[:2])
    ]


def _engine_layers(engine: EngineGeometry) -> dict[str, dict[str, str]]:
    groups = engine.ranks[0].groups
    out = {}
    for name, holders in engine.layer_holders().items():
        heads = sorted({head for _, layer in holders for head in layer.heads})
        runs = [[n for _, n in run] for _, run in groupby(enumerate(heads), lambda item: item[1] - item[0])]
        spans = " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        out[name] = {"KV heads": spans, **holders[0][1].comparable(groups[holders[0][1].group])}
    return out


def _some(names: Iterable[str]) -> str:
    first, *rest = names
    return repr(first) + (f" and {len(rest)} more" if rest else "")


def _require(is_met: bool, text: str) -> None:
    if not is_met:
        raise ValueError(text)
