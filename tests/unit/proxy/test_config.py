"""What the proxy's settings may say."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.errors import ConfigError
from kvferry.proxy.config import ProxyConfig

GOOD: dict[str, Any] = {"prefill": ["http://a:1"], "decode": ["http://b:1"]}


def test_urls_lose_what_people_paste_along() -> None:
    config = ProxyConfig.parse({"prefill": ["http://a:1/", "https://h/x/v1"], "decode": ["http://[::1]:2/v1/"]})
    assert config.prefill == ("http://a:1", "https://h/x")
    assert config.decode == ("http://[::1]:2",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefil": []}, r"proxy\.prefil is unknown \(did you mean 'prefill'\?\)"),
        ({"prefill": []}, r"proxy\.prefill is empty"),
        ({"prefill": "http://a:1"}, r"proxy\.prefill='http://a:1' must be a list of texts"),
        ({"prefill": [1]}, r"proxy\.prefill\[0\]=1 must be text"),
        ({"decode": ["b:1"]}, r"proxy\.decode='b:1' is no engine's URL"),
        ({"decode": ["http://"]}, "no engine's URL"),
        ({"decode": ["http://b:99999"]}, "no engine's URL"),
        ({"decode": ["http://b/?x=1"]}, "no engine's URL"),
        ({"decode": ["http://me:secret@b"]}, "no engine's URL"),
        ({"decode": ["http://a:1/v1"]}, r"proxy\.decode='http://a:1' is named twice \(in prefill\)"),
        ({"max_attempts": 0}, r"proxy\.max_attempts=0 must be at least 1"),
        ({"probe_interval_s": -1}, r"proxy\.probe_interval_s"),
        ({"prefill_timeout_s": float("inf")}, r"proxy\.prefill_timeout_s"),
        ({"max_backoff_s": 0.1}, r"proxy\.max_backoff_s=0\.1 must be at least min_backoff_s=0\.5"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProxyConfig.parse(GOOD | change)
