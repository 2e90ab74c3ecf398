"""Why a prefix was a hit or not: the store's account of each chunk, as runs of tokens."""

from __future__ import annotations

from collections.abc import Iterator

from kvferry.contract.explain import PrefixRange
from kvferry.contract.host import HostInfo
from kvferry.contract.identity import KeyMaker
from kvferry.offloading.config import ChunkGeometry
from kvferry.offloading.requests import LoadState, RequestState
from kvferry.offloading.store.tiered import TieredStore
from kvferry.types import AttentionKind, GroupInfo

NOWHERE = "nowhere"


def explain_prefix(
    state: RequestState, store: TieredStore, keys: KeyMaker, host: HostInfo, geometry: ChunkGeometry
) -> list[PrefixRange]:
    """The request's tokens behind its local ones, run by run, of every group. Looks only at the store's index."""
    start, end = state.num_local_tokens, state.view.num_tokens
    if start >= end:
        return []
    groups = host.groups
    if host.no_hits_reason is not None:
        return [PrefixRange(start, end, NOWHERE, f"nothing is loaded: {host.no_hits_reason}")]
    if state.chain is None or not keys.is_certain(state.view.lora_path):
        return [PrefixRange(start, end, NOWHERE, _why_not_cacheable(state, keys))]
    num_chunks = state.chain.num_hashed_tokens // geometry.chunk_tokens
    ranges: list[PrefixRange] = []
    for group in groups:
        group_id = group.group_id if len(groups) > 1 else None
        first = start
        for chunk, (place, reason) in enumerate(
            _chunks(state, store, keys, group, range(start // geometry.chunk_tokens, num_chunks), geometry),
            start=start // geometry.chunk_tokens,
        ):
            last = (chunk + 1) * geometry.chunk_tokens
            ranges.append(PrefixRange(first, last, place, reason, group_id))
            first = last
        if first < end:
            reason = f"less than one chunk of {geometry.chunk_tokens} tokens"
            ranges.append(PrefixRange(first, end, NOWHERE, reason, group_id))
    return _merged(ranges)


def _why_not_cacheable(state: RequestState, keys: KeyMaker) -> str:
    if state.view.has_unhashable_input:
        return "not cacheable: the prompt is not (only) token ids"
    if keys.has_uncertain_media(state.view):
        return f"not cacheable: {keys.no_media}"
    if state.view.lora_path is not None:
        return f"not cacheable: LoRA adapter {state.view.lora_path}: {keys.why_not(state.view.lora_path)}"
    if not keys.is_certain(None):
        return f"not cacheable: {keys.why_not(None)}"
    return "not cacheable: the request was given further media"


def _chunks(
    state: RequestState,
    store: TieredStore,
    keys: KeyMaker,
    group: GroupInfo,
    chunks: range,
    geometry: ChunkGeometry,
) -> Iterator[tuple[str, str]]:
    """(place, reason) of each chunk of a group; of several shards, the one that is farthest away."""
    assert state.chain is not None
    refusal = _refusal(state)
    is_broken = False
    for chunk in chunks:
        value = state.chain.value_at((chunk + 1) * geometry.chunk_tokens)
        place, reason = max((store.explain(key) for key in keys.shards(value, group.group_id)), key=_distance)
        if place == NOWHERE:
            is_broken = group.kind is AttentionKind.FULL
        elif refusal is not None:
            reason = f"{reason}, but {refusal}"
        elif is_broken:
            reason = f"{reason}, but of no use: a chunk before it is missing"
        yield place, reason


def _refusal(state: RequestState) -> str | None:
    """Why the request would not load what is there."""
    if state.load is LoadState.FAILED:
        return "this request's earlier load failed, so it claims nothing more"
    return None


def _distance(found: tuple[str, str]) -> int:
    return {"host": 0, "pending": 1, NOWHERE: 3}.get(found[0], 2)


def _merged(ranges: list[PrefixRange]) -> list[PrefixRange]:
    merged: list[PrefixRange] = []
    for new in ranges:
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.place, last.reason, last.group_id) == (new.place, new.reason, new.group_id)
            and last.end_token == new.first_token
        ):
            merged[-1] = PrefixRange(last.first_token, new.end_token, new.place, new.reason, new.group_id)
        else:
            merged.append(new)
    return merged
