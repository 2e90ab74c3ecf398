"""What two engines compare of a hand-over's bytes. The digests are made by `kvferry.p2p.digester`.

    block     xxh3-128 of its payload (`kvferry.kv.layout`); of a partly filled one, of the elements of its tokens
    rank      xxh3-128 of the digests of the blocks that count, position by position, group after group
    engine    one such digest per rank (`BytesProof`)

Equal KV has equal digests only where both engines cut and order it alike: same ranks, groups, layers, pages and order
within a page, which `proof_form` tells. Where in memory blocks lie, and in what order, does not count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from kvferry.kv.keys import DIGEST_BYTES, digest
from kvferry.p2p.actions import GroupRule
from kvferry.p2p.geometry import EngineGeometry
from kvferry.p2p.messages import BytesProof, GroupBlocks
from kvferry.types import NULL_BLOCK_ID

RankDigests = tuple[bytes, ...]
"""Of one rank: per group the digests of its blocks by position, zeros where there is none."""


def first_blocks(
    ours: GroupBlocks, theirs: GroupBlocks, groups: Sequence[GroupRule], token_range: tuple[int, int]
) -> tuple[int, ...] | None:
    """By group the position from which on both have all blocks of the range; None where they count differently."""
    first, end = token_range
    out = []
    for group, a, b in zip(groups, ours, theirs, strict=False):
        start, stop = (-(-token // group.block_tokens) for token in (first, end))
        if min(len(a), len(b)) < stop:
            return None
        at = stop
        while at > start and NULL_BLOCK_ID not in (a[at - 1], b[at - 1]):
            at -= 1
        out.append(at)
    return tuple(out) if len(out) == len(groups) == len(theirs) else None


def make_proof(
    ranks: Sequence[RankDigests | None], groups: Sequence[GroupRule], firsts: tuple[int, ...] | None, end_token: int
) -> BytesProof | None:
    """Of the blocks from `firsts` on that hold tokens before the end. None: some rank has no digests."""
    if firsts is None or len(firsts) != len(groups):
        return None
    stops = [-(-end_token // group.block_tokens) for group in groups]
    out = []
    for rank in ranks:
        if rank is None:
            return None
        parts = zip(rank, firsts, stops, strict=True)
        out.append(digest(b"".join(of[first * DIGEST_BYTES : stop * DIGEST_BYTES] for of, first, stop in parts)))
    return BytesProof(firsts, end_token, tuple(out))


def proof_form(engine: EngineGeometry) -> bytes:
    """Equal where equal KV has equal digests."""
    ranks = [
        [
            [y.group, y.layout.name, y.heads, y.parts, y.form.value, y.layout.shape, y.layout.payload_description()]
            for y in sorted(rank.layers, key=lambda y: y.group)
        ]
        for rank in engine.ranks
    ]
    groups = [group.block_tokens for group in engine.ranks[0].groups]
    return digest(json.dumps([groups, ranks]).encode())
