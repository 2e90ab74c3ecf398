"""Clauses of the connector contract that can be checked on a hook's answer: each function names the one that is broken.

All return the clause in plain words, or None when the answer keeps the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from kvferry.contract.base import LoadFailure
from kvferry.contract.explain import PrefixRange

Clause = Callable[[Any], str | None]


def broken_match(answer: Any, num_local: int, num_tokens: int) -> str | None:
    """Of `get_num_new_matched_tokens` for a request of `num_tokens` tokens, the first `num_local` of them at hand.

    A claim may end within a block: the host computes the rest of that block, as vLLM does.
    """
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
    if num_external == left and not is_async:
        return "a synchronous load must leave at least one token to compute"
    return None


def broken_groups(answer: Any, group_ids: Collection[int]) -> str | None:
    """Of `get_loaded_kv_cache_group_ids`."""
    if isinstance(answer, tuple) and all(_is_int(group) and group in group_ids for group in answer):
        return None
    return f"must be a tuple of KV cache groups among {sorted(group_ids)}"


def broken_sources(answer: Any, num_external: int) -> str | None:
    """Of `get_external_cache_hit_sources`."""
    counts = list(answer.values()) if isinstance(answer, dict) else [-1]
    if all(_is_int(num) and num >= 0 for num in counts) and sum(counts) == num_external:
        return None
    return f"must be a dict of token counts that sum to {num_external}"


def broken_meta(answer: Any) -> str | None:
    """Of `build_connector_meta`."""
    return "must be an object, in every step" if answer is None else None


def broken_finish(answer: Any) -> str | None:
    """Of `request_finished` and `request_finished_all_groups`."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], bool)):
        return "must be (bool, parameters or None)"
    return None if answer[1] is None or isinstance(answer[1], dict) else "the parameters must be a dict or None"


def broken_explanation(answer: Any) -> str | None:
    """Of `explain_prefix`."""
    if isinstance(answer, list) and all(isinstance(item, PrefixRange) for item in answer):
        return None
    return "must be a list of PrefixRange"


def broken_binding(answer: Any) -> str | None:
    """Of `has_connector_metadata` between bind and clear."""
    return None if answer is True else "must be True between bind_connector_metadata and clear_connector_metadata"


def broken_results(answer: Any) -> str | None:
    """Of `get_transfer_results`."""
    for name in ("finished_sending", "finished_recving", "failed_recving"):
        ids = getattr(answer, name, None)
        if not (isinstance(ids, set | frozenset) and all(isinstance(request_id, str) for request_id in ids)):
            return f"must have a set of request ids named {name}"
    failures: Any = getattr(answer, "failed_blocks", set())
    if isinstance(failures, set | frozenset) and all(isinstance(item, LoadFailure) for item in failures):
        return None
    return "failed_blocks must be a set of LoadFailure"


def broken_block_ids(answer: Any) -> str | None:
    """Of `get_block_ids_with_load_errors`."""
    if isinstance(answer, set | frozenset | list | tuple) and all(map(_is_int, answer)):
        return None
    return "must be a set of block ids"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
