"""What the demo's engine process says of models that it cannot use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvferry.cli.demo_child import _chat_prompt, _pool_bytes
from kvferry.errors import ConfigError


def llm(**parts: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(model_config=SimpleNamespace(model="/m/odd")), **parts)


def test_model_that_cannot_be_used_is_named_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"'/m/odd' has no tokenizer, .*tokenizer\.json into.* --model"):
        _chat_prompt(llm(tokenizer=None), "text")
    with pytest.raises(ConfigError, match=r"'/m/odd' has 2 KV cache groups, .* --model"):
        _pool_bytes(llm(kv_cache_config=SimpleNamespace(kv_cache_groups=["full", "sliding"])))
