"""That probes go on whatever comes of one, and that the proxy closes its connections at its end."""

from __future__ import annotations

import asyncio

import pytest

from kvferry.proxy.app import Proxy
from kvferry.proxy.config import ProxyConfig


def test_probe_that_fails_unexpectedly_is_logged_and_the_next_ones_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = Proxy(ProxyConfig.parse({"prefill": ["http://p:1"], "decode": ["http://d:1"], "probe_interval_s": 0.01}))
    num_probes, closed = 0, []

    async def prefill(*_: object) -> None:
        nonlocal num_probes
        num_probes += 1
        raise RuntimeError("what nobody thought of")

    async def serve() -> None:
        app = proxy.app()
        async with asyncio.timeout(30), app.router.lifespan_context(app):
            while num_probes < 3:
                await asyncio.sleep(0)

    monkeypatch.setattr(proxy.prober, "prefill", prefill)
    for relay in (proxy.relay, proxy.prober):
        whole = relay.aclose
        monkeypatch.setattr(relay, "aclose", lambda relay=relay, whole=whole: closed.append(relay) or whole())
    asyncio.run(serve())
    assert closed == [proxy.relay, proxy.prober]
    assert "what nobody thought of" in caplog.text
