"""One token further back, for decode engines that compute the last token of a prompt again.

    tokens of the prompt     0 . . . . . n-w | n-w+1 . . . n-1        w: window
    the next token (n) sees                    └──────────────► n
    the last one (n-1) sees            └──────────────────► n-1

vLLM drops what token n does not see, both where a prompt has been computed (just before `request_finished`) and where
its KV has been loaded; then it computes token n-1 again, and reads token n-w from the null block. That is another block
whenever one begins with token n-w+1. So the prefill side keeps the block, and the decode side asks for n-1 tokens.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from kvferry.contract.views import BlockIds, StepView
from kvferry.types import NULL_BLOCK_ID, GroupInfo


def begins_with_block(groups: Sequence[GroupInfo], num_tokens: int) -> bool:
    """Whether a block begins with the first token that the next one, behind so many, sees."""
    windows = [(num_tokens - group.window_tokens + 1, group) for group in groups if group.window_tokens is not None]
    return any(first > 0 and first % group.block_tokens == 0 for first, group in windows)


class LastTables:
    """The block tables of requests that are to be handed over, as of the last step in which they computed."""

    def __init__(self, groups: Sequence[GroupInfo]) -> None:
        self._groups = groups if any(group.window_tokens is not None for group in groups) else ()
        self._tables: dict[str, BlockIds] = {}

    def note(self, step: StepView, request_ids: Container[str]) -> None:
        """Of a step that is about to run."""
        for scheduled in step.scheduled if self._groups else ():
            if scheduled.request_id in request_ids:
                self._tables[scheduled.request_id] = scheduled.block_ids

    def restore(self, request_id: str, block_ids: BlockIds, num_tokens: int) -> tuple[BlockIds, list[int]]:
        """The table with the block of the first token that the last of `num_tokens` sees; and what came back that way.

        Of a request that ends with its first output, so that the host has dropped it just now: its bytes are there as
        long as the caller pins it before the next step. The request is forgotten.
        """
        tables, restored = tuple(list(table) for table in block_ids), []
        for group, table, last in zip(self._groups, tables, self._tables.pop(request_id, ()), strict=False):
            at = (num_tokens - (group.window_tokens or 0)) // group.block_tokens
            if 0 <= at < len(table) and table[at] == NULL_BLOCK_ID != last[at]:
                table[at] = last[at]
                restored.append(last[at])
        return tables, restored
