"""Two engines of one model whose chat templates differ by a date, behind the proxy, all real processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from tests import small_tokenizer
from tests.e2e.test_proxy_p2p import GREEDY, Engine, chat, proxying, started, transfer, wait_until
from tests.e2e.test_serve import NAMED, model_folder

__all__ = ["model_folder"]  # a fixture
pytestmark = pytest.mark.timeout(900)

NO_PROBES = ("--probe-interval-s", "0")
ASK: dict[str, Any] = {**GREEDY, **chat("Tell me of the ferry. " * 9), "extra_body": {"ignore_eos": True}}


def dated(folder: Path, to: Path, date: str) -> Path:
    """The model with a template that begins with a date."""
    shutil.copytree(folder, to)
    tokenizer = small_tokenizer.byte_level()
    tokenizer.chat_template = f"Today is {date}. {small_tokenizer.CHAT_TEMPLATE}"
    tokenizer.save_pretrained(to)
    return to


@pytest.fixture(scope="module", params=["recompute", "fail"])
def engines(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, list[Engine]]]:
    """One prefills, one decodes, and one with the decode engine's template is asked by itself."""
    folder = tmp_path_factory.mktemp("dated")
    first, second = (dated(model_folder, folder / date, f"{date} May") for date in ("1", "12"))
    decode = (str(second), *transfer("kv_consumer", request.param), *NAMED)
    with started((str(first), *transfer("kv_producer"), *NAMED), decode, (str(second), *NAMED)) as found:
        yield request.param, found


@contextmanager
def routed(prefill: Engine, decode: Engine, *options: str) -> Iterator[openai.OpenAI]:
    with proxying([prefill.url], [decode], *NO_PROBES, *options) as proxy:
        yield proxy.client


def answer(client: openai.OpenAI) -> tuple[str | None, int]:
    reply = client.chat.completions.create(**ASK)
    assert reply.usage is not None
    return reply.choices[0].message.content, reply.usage.prompt_tokens


def test_templates_that_differ_by_a_date_are_refused_with_the_reason_and_nothing_is_cached(
    engines: tuple[str, list[Engine]],
) -> None:
    policy, (prefill, decode, alone) = engines
    right, num_tokens = answer(alone.client)
    assert answer(prefill.client)[1] == num_tokens - 1, "one letter of the date"
    with (
        routed(prefill, decode) as strict,
        pytest.raises(openai.APIStatusError, match=r"the KV of other tokens.*chat templates"),
    ):
        answer(strict)
    with routed(prefill, decode, "--no-strict") as lenient:
        if policy == "recompute":
            assert answer(lenient) == (right, num_tokens)
        else:
            with pytest.raises(openai.APIStatusError, match="the KV of other tokens"):
                answer(lenient)
    assert decode.prefilled_and_moved()[1] == 0, "no byte was fetched"
    assert answer(decode.client) == (right, num_tokens), "also from what its prefix cache holds now"
    wait_until("the prefill engine holds nothing for the refused", prefill.is_idle, timeout_s=20)


def test_same_templates_hand_over(engines: tuple[str, list[Engine]]) -> None:
    """So that the refusal is one for the date."""
    _, (prefill, decode, _) = engines
    body = json.dumps({**GREEDY, "prompt": list(range(5, 205))})
    with routed(prefill, decode) as client:
        reply = httpx2.post(f"{client.base_url}completions", content=body, timeout=60)
        assert reply.status_code == 200, reply.text
    assert decode.prefilled_and_moved()[1] > 0
