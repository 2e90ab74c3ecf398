"""Chunks of a stream, made from what the engine reports."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from kvferry.server.protocol import CompletionBody
from kvferry.server.replies import Choice, CompletionDialect, CompletionReply


def delta(text: str, token: int, num_cached_tokens: int) -> RequestOutput:
    """A token that came, with the text that it completes."""
    output = CompletionOutput(text, [token], finish_reason=None)
    prompt = list(range(40))
    return RequestOutput("r", None, prompt, [output], num_cached_tokens, 0, RequestMetrics(0.1, None), finished=False)


@pytest.mark.parametrize("first_text", ["a", ""], ids=["text", "no text yet"])
def test_prompt_computed_again_is_told_before_anything_else(first_text: str) -> None:
    """Also where the first token completes no character."""
    reply = CompletionReply("id", "m", CompletionDialect(), 1, num_promised_tokens=40, choices=[Choice(0)])
    first = reply.chunk(reply.choices[0], delta(first_text, 5, num_cached_tokens=16))
    assert first is not None
    assert first["kv_transfer_params"] == {"num_recomputed_tokens": 23}, "39 could have been there, 16 were"
    second = reply.chunk(reply.choices[0], delta("b", 6, num_cached_tokens=16))
    assert second is not None
    assert "kv_transfer_params" not in second
    assert second["choices"][0]["text"] == "b"


def test_nothing_is_told_of_a_token_without_text() -> None:
    reply = CompletionReply("id", "m", CompletionDialect(), 1, choices=[Choice(0)])
    assert reply.chunk(reply.choices[0], delta("", 5, num_cached_tokens=16)) is None


@pytest.mark.parametrize(
    ("params", "cached"),
    [
        ({"do_remote_prefill": True, "remote_prefill_cached_tokens": 0}, 0),
        ({"do_remote_prefill": True, "remote_prefill_cached_tokens": 32}, 32),
        ({"do_remote_prefill": True, "remote_prefill_cached_tokens": 10**9}, 40),
        ({"do_remote_prefill": True, "remote_prefill_cached_tokens": -1}, 39),
        ({"do_remote_prefill": True, "remote_prefill_cached_tokens": True}, 39),
        ({"do_remote_prefill": True}, 39),
        ({"remote_prefill_cached_tokens": 32}, 39),
        (None, 39),
    ],
)
def test_cached_tokens_of_a_handed_over_prompt_are_the_prefill_engines(params: Any, cached: int) -> None:
    body = CompletionBody(prompt=[1], kv_transfer_params=params)
    reply = CompletionReply(
        "id", "m", CompletionDialect(), 1, num_remote_cached_tokens=body.num_remote_cached_tokens, choices=[Choice(0)]
    )
    reply.choices[0].add(delta("a", 5, num_cached_tokens=39))
    assert reply.usage()["prompt_tokens_details"]["cached_tokens"] == cached
