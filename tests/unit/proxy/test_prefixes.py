"""Which beginnings of prompts count as the same."""

from __future__ import annotations

import random
from typing import Any

from kvferry.proxy.prefixes import PIECE_BYTES, PrefixMemory, piece_hashes

TEXT = "".join(random.Random(3).choices("abcdefgh ", k=4 * PIECE_BYTES))


def common(one: dict[str, Any], other: dict[str, Any]) -> int:
    a, b = piece_hashes(one), piece_hashes(other)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_pieces_are_shared_up_to_the_first_difference() -> None:
    changed = TEXT[:1500] + "#" + TEXT[1501:]
    assert common({"prompt": TEXT}, {"prompt": changed}) == 1501 // PIECE_BYTES
    assert common({"prompt": TEXT}, {"prompt": TEXT + "more"}) == len(piece_hashes({"prompt": TEXT})) == 4
    assert common({"prompt": TEXT}, {"prompt": "#" + TEXT}) == 0
    tail = TEXT[PIECE_BYTES:]
    assert not set(piece_hashes({"prompt": TEXT})) & set(piece_hashes({"prompt": tail})), "a hash means all before it"


def test_token_ids_and_conversations_have_prefixes_too() -> None:
    ids = list(range(1000, 2000))
    assert common({"prompt": ids}, {"prompt": [*ids[:500], 7, *ids[500:]]}) == 500 * 6 // PIECE_BYTES
    turns = [{"role": "user", "content": TEXT}]
    longer = [*turns, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and?"}]
    assert common({"messages": turns}, {"messages": longer}) >= 3


def test_what_makes_other_kv_makes_other_pieces() -> None:
    for change in ({"model": "m"}, {"cache_salt": "s"}, {"tools": [{"type": "function"}]}):
        assert common({"prompt": TEXT}, {"prompt": TEXT} | change) == 0
    assert common({"prompt": TEXT, "temperature": 0}, {"prompt": TEXT, "temperature": 1}) == 4


def test_odd_prompts_have_pieces_or_none() -> None:
    for prompt in (None, "", 7, [], {"a": 1}, "\ud800" * PIECE_BYTES):
        assert len(piece_hashes({"prompt": prompt})) <= 3


def test_memory_is_bounded_and_forgets_tails_first() -> None:
    memory = PrefixMemory(10)
    old, new = list(range(6)), list(range(100, 106))
    memory.remember(old)
    memory.remember(new)
    assert len(memory) == 10
    assert memory.num_known(new) == 6
    assert memory.num_known(old) == 4
    memory.remember(old[:2])
    memory.remember(list(range(200, 208)))
    assert memory.num_known(old) == 2, "what was used again stayed"
    memory.clear()
    assert memory.num_known(old) == 0
