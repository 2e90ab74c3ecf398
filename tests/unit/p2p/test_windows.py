"""Blocks that only the last token of a prompt sees."""

from __future__ import annotations

import pytest

from kvferry.contract.views import ScheduledRequest, StepView
from kvferry.p2p.windows import LastTables, begins_with_block
from kvferry.types import AttentionKind, GroupInfo

FULL = GroupInfo(0, ("a",), 4, AttentionKind.FULL, None)
WINDOW = GroupInfo(1, ("b",), 4, AttentionKind.SLIDING_WINDOW, 6)


@pytest.mark.parametrize("num_tokens", range(1, 40))
def test_a_block_begins_with_what_the_next_token_sees(num_tokens: int) -> None:
    seen_by_next = [token for token in range(num_tokens) if num_tokens - token < 6]
    seen_by_last = [token for token in range(num_tokens) if num_tokens - 1 - token < 6]
    needs_one_more = seen_by_last[0] // 4 < seen_by_next[0] // 4
    assert begins_with_block([FULL, WINDOW], num_tokens) == needs_one_more
    assert not begins_with_block([FULL], num_tokens)


def test_the_block_that_the_host_has_dropped_comes_back() -> None:
    tables = LastTables([FULL, WINDOW])
    step = StepView(
        [ScheduledRequest("a", 0, 13, ([1, 2, 3, 4], [5, 6, 7, 8])), ScheduledRequest("b", 0, 4, ([9], [10]))]
    )
    tables.note(step, {"a"})
    # Token 13 sees 8 to 12, so that blocks 0 and 1 went; token 12 sees token 7, which is in block 1.
    assert tables.restore("a", ([1, 2, 3, 4], [0, 0, 7, 8]), 13) == (([1, 2, 3, 4], [0, 6, 7, 8]), [6])
    assert tables.restore("a", ([1, 2, 3, 4], [0, 0, 7, 8]), 13) == (([1, 2, 3, 4], [0, 0, 7, 8]), []), (
        "it is forgotten"
    )
    assert tables.restore("b", ([9], [0]), 4) == (([9], [0]), []), "it was not to be noted"
    tables.note(step, {"a"})
    assert tables.restore("a", ([1, 2, 3, 4], [0, 6, 7, 8]), 13) == (([1, 2, 3, 4], [0, 6, 7, 8]), [])
