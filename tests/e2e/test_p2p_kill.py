"""Engines that hand KV over through shared memory are killed and stopped (see `p2p_kill`), and so is the proxy."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from p2p_kill import KillCases
from tests.e2e.test_proxy_process import proxying, wait_for_status
from tests.e2e.test_serve import NAMED, model_folder, serving
from tests.patience import PATIENCE_S

__all__ = ["model_folder"]  # a fixture


class TestShm(KillCases):
    transport = "shm"


def p2p(mode: str) -> tuple[str, ...]:
    config = {
        "kv_connector": "P2PConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"transport": "shm", "mode": mode, "lease_s": 15.0, "handshake_s": 30.0},
    }  # fmt: skip
    return ("--kv-transfer-config", json.dumps(config), *NAMED)


def figure(engine: openai.OpenAI, name: str) -> float:
    """The sum of a metric's series."""
    text = httpx2.get(str(engine.base_url).replace("/v1/", "/metrics"), timeout=60).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def wait_until_idle(engine: openai.OpenAI) -> None:
    """No request runs or waits, and no block is in use."""
    names = (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "kvferry:held_blocks",
    )
    deadline_s = time.monotonic() + PATIENCE_S
    while any(figures := {name: figure(engine, name) for name in names}.values()):
        assert time.monotonic() < deadline_s, dict(zip(names, figures, strict=True))
        time.sleep(0.1)


def test_the_proxy_is_killed_while_it_answers(model_folder: Path) -> None:
    """Both engines give up what nobody reads any more, and serve the next proxy."""
    with ExitStack() as stack:
        with ThreadPoolExecutor() as pool:  # they start side by side
            starts = [pool.submit(lambda: stack.enter_context(serving(model_folder, *p2p("pull")))[1]) for _ in "PD"]
            prefill, decode = (start.result() for start in starts)
        options = ("--prefill", str(prefill.base_url), "--decode", str(decode.base_url), "--probe-interval-s", "0.2")
        request: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}
        with proxying(*options) as (process, url):
            wait_for_status(f"{url}/ready", 200)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
            prompts = [[2 + (i * 31 + i * i + number) % 250 for i in range(300)] for number in range(6)]
            create = client.completions.create
            streams = [create(prompt=prompt, max_tokens=3000, stream=True, **request) for prompt in prompts[:4]]
            for stream in streams:
                next(iter(stream))
            process.send_signal(signal.SIGKILL)  # in the middle of all streams
            for stream in streams:
                with pytest.raises((openai.APIError, httpx2.HTTPError)):
                    list(stream)
        for engine in (prefill, decode):
            wait_until_idle(engine)
        assert figure(decode, "vllm:generation_tokens_total") < 4 * 3000, "aborted, not finished for nobody"
        before = figure(decode, "kvferry:connector_hit_tokens_total")
        with proxying(*options) as (_, url):
            wait_for_status(f"{url}/ready", 200)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
            reply = client.completions.create(prompt=prompts[5], max_tokens=20, **request)
            assert figure(decode, "kvferry:connector_hit_tokens_total") - before >= 300
        alone = decode.completions.create(prompt=prompts[5], max_tokens=20, **request)
        assert reply.choices[0].text == alone.choices[0].text
