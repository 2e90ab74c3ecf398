"""A vLLM engine as a child process, as tests see it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ANSWER = "kvferry-answer "
TIE = 1e-4
# P2P settings with which nothing is given up because the machine is busy.
PATIENT = {"handshake_s": 200.0, "liveness_s": 200.0, "claim_s": 200.0, "load_s": 300.0, "lease_s": 400.0}
SHUTDOWN_S = 200
"""How long engines may take to stop. vLLM kills them after 5 s, of which it needs 4 to 5 by itself here."""


def vllm_environment(**more: str) -> dict[str, str]:
    """Environment of a small vLLM on CPU with kvferry on its path; `more` comes on top.

    Its ranks, and threads, spin while they wait for each other. Bound to cores they starve others there, the tests of
    the other half (`-n 2`) too: loads were seen to fail, and prefills of 203 tokens to take 20 s.
    """
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": str(SHUTDOWN_S),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        **more,
    }


class EngineChild:
    """A vLLM engine (with its spawned core) in a process group of its own; `wait_until_up` comes first."""

    def __init__(self, llm: dict[str, Any], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        self._command = [sys.executable, str(HERE / "engine_child.py"), json.dumps({"llm": llm})]
        self._env = vllm_environment(**(env or {}))
        self._launch()

    def _launch(self) -> None:
        with self.log.open("ab") as stderr:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=self._env,
                start_new_session=True,
                text=True,
            )

    def wait_until_up(self) -> None:
        """AssertionError, with the end of its log, when it ends."""
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                answer: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return answer
            with self.log.open("a") as log:
                log.write(line)
        raise AssertionError(f"the engine ended; its log:\n{self.log.read_text()[-6000:]}")

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send one command (its first key names it) and return its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> int:
        """Shut the engine down in good order; its exit status."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"stop": SHUTDOWN_S}) + "\n")
        self._process.stdin.flush()
        output, _ = self._process.communicate(timeout=2 * SHUTDOWN_S)
        with self.log.open("a") as log:
            log.write(output)
        self.kill()
        return self._process.returncode

    def restart(self) -> int:
        """Shut the engine down in good order and start another like it; the first one's exit status."""
        status = self.stop()
        self._launch()
        self.wait_until_up()
        return status

    def kill(self) -> None:
        """SIGKILL to the engine and everything it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def assert_same_tokens(got: dict[str, Any], reference: dict[str, Any]) -> None:
    """Equal, except from the first position on where the reference's top-2 gap is below 1e-4 (DESIGN)."""
    assert len(got["token_ids"]) == len(reference["token_ids"])
    for position, gap in enumerate(reference["logit_gaps"]):
        if gap < TIE:
            assert position > 0, "nothing was compared: choose another prompt"
            print(f"near tie at position {position}: the rest is not compared")
            return
        assert got["token_ids"][position] == reference["token_ids"][position], f"token {position}"


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    """Token ids of the tiny models' vocabulary; prompts of different seeds share no prefix."""
    rng = random.Random(seed)
    return [rng.randrange(3, 512) for _ in range(num_tokens)]


def offloading(policy: str, extra: dict[str, Any]) -> dict[str, Any]:
    """A kv_transfer_config with kvferry's OffloadingConnector."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_connector_module_path": "kvferry.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28, "stall_timeout_s": 60.0, **extra},
    }
