"""Which blocks of a finished request are handed over: clipped to its tokens, and per group to what a decoder reads."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.p2p.actions import GroupRule
from kvferry.p2p.messages import GroupBlocks
from kvferry.types import NULL_BLOCK_ID


def select_blocks(blocks: Sequence[Sequence[int]], groups: Sequence[GroupRule], num_tokens: int) -> GroupBlocks:
    """Per group the block ids of [0, num_tokens) by position, NULL_BLOCK_ID where nothing needs to be read.

    ValueError when the number of groups differs, or a group has too few blocks. A decoder that computes the last
    token of the prompt again reads `window_tokens` positions before it, so the window counts back from `num_tokens`.
    """
    if len(blocks) != len(groups):
        raise ValueError(f"blocks of {len(blocks)} groups given, the engine has {len(groups)}")
    return tuple(
        _select(ids, rule, num_tokens, group) for group, (ids, rule) in enumerate(zip(blocks, groups, strict=True))
    )


def _select(ids: Sequence[int], rule: GroupRule, num_tokens: int, group: int) -> tuple[int, ...]:
    needed = -(-num_tokens // rule.block_tokens)
    if len(ids) < needed:
        raise ValueError(f"group {group} has {len(ids)} blocks of {rule.block_tokens} tokens for {num_tokens} tokens")
    first = 0 if rule.window_tokens is None else max(0, num_tokens - rule.window_tokens) // rule.block_tokens
    return (NULL_BLOCK_ID,) * first + tuple(ids[first:needed])
