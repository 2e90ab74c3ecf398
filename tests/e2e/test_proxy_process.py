"""`kvferry proxy` as a process before two `kvferry serve` processes, which have no P2P connector."""

from __future__ import annotations

import re
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import openai
import pytest
from tests.e2e.test_serve import KVFERRY, NAMED, fenced, model_folder, run_python, serving
from tests.patience import PATIENCE_S

__all__ = ["model_folder"]  # a fixture
PROMPT = [2 + i % 300 for i in range(120)]


@contextmanager
def proxying(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen([KVFERRY, "proxy", "--port", "0", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0], "the proxy did not start"
        line = process.stdout.readline()
        found = re.fullmatch(r"kvferry proxies 1 prefill and 1 decode engines on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def engines(model_folder: Path) -> Iterator[list[openai.OpenAI]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(model_folder, *NAMED))[1] for _ in range(2)]


def urls(engines: list[openai.OpenAI]) -> list[str]:
    prefill, decode = (str(client.base_url) for client in engines)
    return ["--prefill", prefill, "--decode", decode]


def wait_for_status(url: str, status: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while (reply := httpx2.get(url, timeout=60)).status_code != status:
        assert time.monotonic() < deadline_s, reply.text
        time.sleep(0.05)


def test_answers_are_those_of_one_engine_and_sigterm_drains(engines: list[openai.OpenAI]) -> None:
    request = {"model": "tiny", "max_tokens": 12, "temperature": 0, "extra_body": {"return_token_ids": True}}
    with proxying(*urls(engines), "--no-strict", "--probe-interval-s", "0.2") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        wait_for_status(f"{url}/ready", 200)
        alone, routed = (c.completions.create(**request, prompt=PROMPT) for c in (engines[1], client))
        assert routed.choices[0].model_extra == alone.choices[0].model_extra
        assert len(routed.choices[0].model_extra["token_ids"]) == 12
        assert routed.usage is not None
        assert (routed.usage.prompt_tokens, routed.usage.completion_tokens) == (120, 12)
        assert 'kvferry:proxy_recomputed_total{reason="no_params"}' in httpx2.get(f"{url}/metrics", timeout=60).text

        long = {"model": "tiny", "prompt": PROMPT, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**long, stream=True, stream_options={"include_usage": True})
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 300, "what was under way came to its end"
        assert process.wait(90) == 0


def test_strict_proxy_is_not_ready_and_says_why(engines: list[openai.OpenAI]) -> None:
    with proxying(*urls(engines)) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        with pytest.raises(openai.APIStatusError, match=r"prefill engine http.* P2P connector|no prefill engine"):
            client.completions.create(model="tiny", prompt=PROMPT)
        assert httpx2.get(f"{url}/ready", timeout=60).status_code == 503
        assert httpx2.get(f"{url}/health", timeout=60).status_code == 200


def test_guides_command_and_program_run(engines: list[openai.OpenAI], tmp_path: Path) -> None:
    name, command, *options = shlex.split(fenced("proxy.md", "console"))
    assert (name, command) == ("kvferry", "proxy")
    prefill, decode = (str(engine.base_url) for engine in engines)
    places = {"http://127.0.0.1:8001": prefill, "http://127.0.0.1:8002": decode}
    with proxying(*(places.get(option, option) for option in options), "--no-strict") as (_, url):
        program = fenced("proxy.md", "python")
        assert "http://127.0.0.1:8100/v1" in program, "the default port"
        run_python(program.replace("http://127.0.0.1:8100", url), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefill", "a:1", "--decode", "http://b:1"], "proxy.prefill='a:1' is no engine's URL"),
        (["--prefill", "http://a:1", "--decode", "http://a:1"], "is named twice"),
        (["--prefill", "http://a:1", "--decode", "http://b:1", "--max-attempts", "0"], "proxy.max_attempts=0"),
        (["--prefill", "http://a:1", "--decode", "http://b:1", "--probe-key-file", "/none"], "probe_key_file='/none'"),
        (["--prefill", "http://a:1", "--decode", "http://b:1", "--shared-key-file", "/dev/null"], "is empty"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = subprocess.run([KVFERRY, "proxy", *arguments], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
