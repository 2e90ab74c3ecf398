"""Clauses of the contract that a connector's answers must keep. Each check returns the broken clause, or None."""

from __future__ import annotations

from typing import Any


def broken_match(answer: Any, num_local: int, num_tokens: int) -> str | None:
    """`get_num_new_matched_tokens`, for a request of `num_tokens` tokens of which `num_local` are computed."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], bool)):
        return "must be (number of tokens or None, bool)"
    num_external, is_async = answer
    if num_external is None:
        return None
    if isinstance(num_external, bool) or not isinstance(num_external, int):
        return "the number of tokens must be an int or None"
    if num_external < 0:
        return "the number of tokens must not be negative"
    if num_external == 0:
        return "nothing cannot be loaded asynchronously: answer (0, False)" if is_async else None
    left = num_tokens - num_local
    if num_external > left:
        return f"claims more than the {left} tokens that are left"
    if not is_async and num_external == left:
        return "a synchronous load must leave at least one token to compute"
    return None


def broken_sources(answer: Any, num_external: int) -> str | None:
    """`get_external_cache_hit_sources`, for a load of `num_external` tokens."""
    counts = list(answer.values()) if isinstance(answer, dict) else [-1]
    if all(isinstance(num, int) and num >= 0 for num in counts) and sum(counts) == num_external:
        return None
    return f"must be a dict of token counts that sum to {num_external}"


def broken_finish(answer: Any) -> str | None:
    """`request_finished` and `request_finished_all_groups`."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], bool)):
        return "must be (bool, parameters or None)"
    return None if answer[1] is None or isinstance(answer[1], dict) else "the parameters must be a dict or None"


def broken_results(answer: Any) -> str | None:
    """`get_transfer_results`."""
    names = ("finished_sending", "finished_recving", "failed_recving")
    if all(isinstance(getattr(answer, name, None), set | frozenset) for name in names):
        return None
    return f"must have sets named {', '.join(names)}"


def broken_block_ids(answer: Any) -> str | None:
    """`get_block_ids_with_load_errors`."""
    if isinstance(answer, set | frozenset | list | tuple) and all(isinstance(block_id, int) for block_id in answer):
        return None
    return "must be a set of block ids"
