"""A real `lmcache server` 0.5.6 as a child process, for tests."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_S = 300


def server_python() -> Path:
    """The python beside which lmcache is: KVFERRY_LMCACHE_PYTHON, or that of `make test-lmcache`."""
    return Path(os.environ.get("KVFERRY_LMCACHE_PYTHON") or ROOT / ".venv-lmcache" / "bin" / "python")


def free_ports(count: int) -> list[int]:
    """Ports that are free, below those that the system hands out: nobody gets them before they are used."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)


class LMCacheServer:
    """Started on construction; `kill`, `stop`, `resume` and `start` may be called in any sensible order."""

    def __init__(self, log: Path, *options: str) -> None:
        self.port, self.http_port = free_ports(2)
        self._log, self._options = log, options
        self.start()

    def start(self) -> None:
        """Start (again), on the same ports; returns when it is healthy."""
        command = [str(server_python().with_name("lmcache")), "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--http-host", "127.0.0.1", "--http-port", str(self.http_port), "--l1-size-gb", "0.25"]
        command += ["--no-l1-use-lazy", "--eviction-policy", "LRU", *self._options]
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env = {**kept, "LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"not healthy within {START_S} s: {self._log.read_text()[-3000:]}"
            time.sleep(0.1)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/healthcheck", timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def pause(self) -> None:
        """SIGSTOP: it keeps its connections and answers nothing."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, to all it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def status(self) -> str:
        """Its own report, as JSON text."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/status", timeout=30) as reply:
            return str(reply.read().decode())

    def log_text(self) -> str:
        """What it has written."""
        return self._log.read_text(errors="replace")
