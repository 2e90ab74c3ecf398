"""Chunks of a stream, made from what the engine reports."""

from __future__ import annotations

import pytest

from kvferry.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from kvferry.engine.server.replies import Choice, CompletionDialect, Reply


def delta(text: str, token: int, num_cached_tokens: int) -> RequestOutput:
    """A token that came, with the text that it completes."""
    output = CompletionOutput(text, [token], finish_reason=None)
    prompt = list(range(40))
    return RequestOutput("r", None, prompt, [output], num_cached_tokens, 0, RequestMetrics(0.1, None), finished=False)


@pytest.mark.parametrize("first_text", ["a", ""], ids=["text", "no text yet"])
def test_prompt_computed_again_is_told_before_anything_else(first_text: str) -> None:
    """Also where the first token completes no character."""
    reply = Reply("id", "m", CompletionDialect(), 1, num_promised_tokens=40, choices=[Choice(0)])
    first = reply.chunk(reply.choices[0], delta(first_text, 5, num_cached_tokens=16))
    assert first is not None
    assert first["kv_transfer_params"] == {"num_recomputed_tokens": 23}, "39 could have been there, 16 were"
    second = reply.chunk(reply.choices[0], delta("b", 6, num_cached_tokens=16))
    assert second is not None
    assert "kv_transfer_params" not in second
    assert second["choices"][0]["text"] == "b"


def test_nothing_is_told_of_a_token_without_text() -> None:
    reply = Reply("id", "m", CompletionDialect(), 1, choices=[Choice(0)])
    assert reply.chunk(reply.choices[0], delta("", 5, num_cached_tokens=16)) is None
