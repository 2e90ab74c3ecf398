"""An engine in a process of its own, told what to do over a pipe: one JSON object a line, one answer each."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from kvferry.errors import ConfigError, KVFerryError

_LOG_TAIL_LINES = 20


class ChildError(KVFerryError):
    """The child process ended, broke or did not answer in time. The text holds the end of its log."""


class EngineProcess:
    """Starts `python -m kvferry.cli.demo_child`. Its log goes to `log_path` (kept when the process is gone).

    `num_threads`: of torch; as many as there are cores, or as the environment says, unless given.
    """

    def __init__(self, log_path: Path, num_threads: int | None = None) -> None:
        self._log_path = log_path
        # Threads that spin at barriers take turns with other processes' instead of working beside them: a prefill
        # took three times as long on two shared cores. Must stand before torch is loaded, hence `env`.
        threads = [] if num_threads is None else [f"OMP_NUM_THREADS={num_threads}"]
        command = ["env", "OMP_WAIT_POLICY=PASSIVE", *threads, sys.executable, "-m", "kvferry.cli.demo_child"]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        self._pending = b""

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def call(self, op: str, *, timeout_s: float = 600.0, **arguments: Any) -> dict[str, Any]:
        """Have the child do `op` and return its answer. Blocks at most `timeout_s` seconds.

        A mistake of the user's (ConfigError in the child) is raised as ConfigError, all else as ChildError.
        """
        self.ask(op, **arguments)
        return self.answer(op, timeout_s)

    def ask(self, op: str, **arguments: Any) -> None:
        """Have the child begin `op`; its `answer` must be fetched before the next. ChildError when it is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone(op) from None

    def answer(self, op: str, timeout_s: float = 600.0) -> dict[str, Any]:
        """What the child says to the `op` it was asked for last; raises as `call` does."""
        answer: dict[str, Any] = json.loads(self._read_line(op, time.monotonic() + timeout_s))
        if (error := answer.get("error")) is not None:
            raise (ConfigError(error) if answer["is_config_error"] else ChildError(f"{error}\n{self.log_tail()}"))
        return answer

    def kill(self) -> int:
        """SIGKILL: the process runs no code of its own any more. Returns the exit status (-9)."""
        self._process.kill()
        return self._process.wait()

    def stop(self, timeout_s: float = 60.0) -> None:
        """End the engine in good order, and wait for the process."""
        self.call("stop", timeout_s=timeout_s)
        self._process.wait(timeout_s)

    def log(self) -> str:
        """All that the processes on this log have written so far."""
        return self._log_path.read_text(errors="replace")

    def log_tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(self.log().splitlines()[-_LOG_TAIL_LINES:])

    def _read_line(self, op: str, deadline_s: float) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise ChildError(f"engine process {self.pid} gave no answer to {op!r} in time\n{self.log_tail()}")
            piece = self._process.stdout.raw.read(65536)  # type: ignore[attr-defined]
            if not piece:
                raise self._gone(op)
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _gone(self, op: str) -> ChildError:
        status = self._process.wait()
        return ChildError(f"engine process {self.pid} ended with status {status} during {op!r}\n{self.log_tail()}")
