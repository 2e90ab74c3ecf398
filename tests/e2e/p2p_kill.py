"""Two engines in processes of their own, one of which is killed or stopped: the cases, for any transport.

Processes are forked from a server that has imported everything, so that a new one is there in a moment. All waits are
bounded. What is right comes from the stub model's definition, where one wrong KV byte is another token.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import p2p_kill_child
import pytest

from kvferry.testing.stub_model import StubModel

PROMPT_TOKENS = 200
BLOCKS = PROMPT_TOKENS // p2p_kill_child.BLOCK
NUM_TOKENS = 8
LONG = 60
PATIENCE_S = 120.0
MODES = ("pull", "push")
MOMENTS = ("before", "during", "after")
DECODE = {"do_remote_decode": True}
FAR: dict[str, float] = {
    "retry_s": 0.05,
    "quarantine_s": 0.2,
    "claim_s": 5.0,
    "lease_s": 30.0,
    "load_s": 40.0,
    "handshake_s": 20.0,
    "liveness_s": 60.0,
}
"""Deadlines of cases in which none should pass, but for claims of the dead."""
NEAR: dict[str, float] = FAR | {"lease_s": 4.0, "load_s": 4.0, "claim_s": 3.0, "liveness_s": 15.0}
"""Deadlines of cases in which somebody is stopped until they have passed."""
_LEFT_OVERS = ("lost_blocks", "pinned_blocks", "told_held_blocks", "num_loads", "producer", "consumer")
_numbers = itertools.count()
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["p2p_kill_child"])


def new_prompt() -> list[int]:
    """Nobody has it cached."""
    number = next(_numbers)
    return [number % 1000, number // 1000, *((i * 31 + i * i) % 1000 for i in range(PROMPT_TOKENS - 2))]


def expected(prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    return StubModel().expected_tokens(prompt, num_tokens)


class Engine:
    """One life of one engine."""

    def __init__(self, transport: str, policy: str, settings: dict[str, Any], log: Path) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._news: dict[str, deque[Any]] = {"port": deque(), "reply": deque(), "half": deque()}
        self._outputs: dict[str, dict[str, Any]] = {}
        self.process = _context.Process(
            target=p2p_kill_child.main, args=(theirs, str(log), transport, settings, policy), daemon=True
        )
        with pytest.MonkeyPatch.context() as patch:  # Python 3.11 starts the server without our `sys.path`
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            self.process.start()
        theirs.close()

    @cached_property
    def port(self) -> int:
        """Where it listens; waits until it does."""
        return int(self._wait("port"))

    def ask(self, *order: Any) -> Any:
        """Call a method of the child's `Child`."""
        self._connection.send(order)
        return self._wait("reply")

    def add(self, prompt: list[int], params: dict[str, Any] | None = None, max_tokens: int = NUM_TOKENS) -> str:
        """Returns at once, also where the engine is stopped."""
        request_id = f"r{next(_numbers)}"
        self._connection.send(("add", request_id, prompt, max_tokens, params))
        return request_id

    def abort(self, request_id: str) -> None:
        """Its result comes all the same."""
        self._connection.send(("abort", request_id))

    def result(self, request_id: str) -> dict[str, Any]:
        """Wait for the end of a request."""
        while request_id not in self._outputs:
            self._hear(PATIENCE_S)
        return self._outputs.pop(request_id)

    def half(self) -> None:
        """Wait until the armed gate has shut in the middle of a transfer."""
        self._wait("half")

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        """The parameters with which another engine decodes."""
        result = self.result(self.add(prompt, DECODE, 1))
        assert result["params"] is not None, result
        return dict(result["params"])

    def until(self, holds: Callable[[dict[str, Any]], bool], within_s: float = PATIENCE_S) -> dict[str, Any]:
        """Wait for a state; answers it."""
        deadline_s = time.monotonic() + within_s
        while not holds(state := self.ask("state")):
            assert time.monotonic() < deadline_s, state
            time.sleep(0.01)
        return dict(state)

    def settle(self, within_s: float = PATIENCE_S) -> None:
        """All blocks come free, nothing is open with anybody, and requests that take up every block go well."""
        self.until(lambda state: not any(state[name] for name in _LEFT_OVERS), within_s)
        self.compute()

    def compute(self) -> None:
        """Fill all free blocks with others' KV, and be right."""
        prompts = [new_prompt() for _ in range(p2p_kill_child.NUM_BLOCKS // BLOCKS + 1)]
        for prompt, request_id in [(prompt, self.add(prompt)) for prompt in prompts]:
            assert self.result(request_id)["tokens"] == expected(prompt)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(PATIENCE_S)
        assert self.process.exitcode == -signal.SIGKILL, self.process.exitcode

    def stop(self) -> None:
        """Returns when all its threads stand still."""
        pid = self.process.pid or 0
        os.kill(pid, signal.SIGSTOP)
        while any(_state(task) not in "Tt" for task in Path(f"/proc/{pid}/task").iterdir()):
            time.sleep(0.001)

    def go_on(self) -> None:
        os.kill(self.process.pid or 0, signal.SIGCONT)

    def end(self) -> None:
        """In good order, if it lives."""
        if self.process.is_alive():
            self.go_on()
            self.ask("gate", "open")
            self.ask("close")
            self.process.join(PATIENCE_S)
            assert self.process.exitcode == 0, self.process.exitcode

    def _wait(self, kind: str) -> Any:
        while not self._news[kind]:
            self._hear(PATIENCE_S)
        return self._news[kind].popleft()

    def _hear(self, within_s: float) -> None:
        assert self._connection.poll(within_s), "no answer"
        try:
            kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise AssertionError("the engine has ended") from error
        if kind == "reply" and value == "added":
            return
        if kind == "output":
            self._outputs[value["request_id"]] = value
        else:
            self._news[kind].append(value)


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # the thread has ended
        return "T"


class Pair:
    """A prefill and a decode engine, and those that take their places."""

    def __init__(self, transport: str, folder: Path) -> None:
        self._transport, self._folder = transport, folder
        self._lives: list[Engine] = []

    def start(self, mode: str, policy: str = "recompute", num_tries: int = 1, **settings: Any) -> None:
        """Both, until they know each other."""
        self._policy, self._settings = policy, {"mode": mode} | settings
        self.prefill, self.decode = self._start(0), self._start(0)
        self.hand_over(num_tries)

    def restart(self, victim: str) -> None:
        """Another engine at the same address; of the dead one no memory is left."""
        dead: Engine = getattr(self, victim)
        new = self._start(dead.port)
        setattr(self, victim, new)
        assert new.port == dead.port
        assert not list(Path("/dev/shm").glob(f"kvferry-*-{dead.process.pid}-*"))

    def hand_over(self, num_tries: int = 1) -> None:
        """The next request: right, and with the other's KV, after so many tries at most."""
        for _ in range(num_tries):
            prompt = new_prompt()
            result = self.decode.result(self.decode.add(prompt, self.prefill.prefill(prompt)))
            assert result["tokens"] == expected(prompt)
            if result["num_external"] == PROMPT_TOKENS:
                return
        raise AssertionError(f"nothing was handed over in {num_tries} tries: {result}")

    def _start(self, port: int) -> Engine:
        log = self._folder / f"engine{len(self._lives)}.log"
        self._lives.append(Engine(self._transport, self._policy, self._settings | {"port": port}, log))
        return self._lives[-1]

    def end(self) -> None:
        try:
            for engine in self._lives:
                engine.end()
        finally:
            for engine in self._lives:
                engine.process.kill()
            for log in sorted(self._folder.glob("*.log")):
                print(f"---- {log.name}", log.read_text(), sep="\n")


class KillCases:
    """Inherit and name the transport."""

    transport: str

    @pytest.fixture
    def pair(self, tmp_path: Path) -> Iterator[Pair]:
        pair = Pair(self.transport, tmp_path)
        yield pair
        pair.end()

    @pytest.mark.parametrize(
        ("mode", "moment", "victim"),
        # A decode engine that has not come is no matter of the mode.
        sorted({*itertools.product(MODES, MOMENTS, ("prefill", "decode"))} - {("push", "before", "decode")}),
    )
    def test_killed(self, pair: Pair, mode: str, moment: str, victim: str) -> None:
        pair.start(mode, num_tries=3, **FAR | ({"lease_s": 6.0} if moment != "after" else {}))
        old_prompt = new_prompt()
        old_params = pair.prefill.prefill(old_prompt) if victim == "prefill" else None
        self.kill_at(pair, mode, moment, victim)
        if victim == "prefill":
            pair.decode.settle(within_s=30.0)
        else:
            pair.prefill.settle(within_s=30.0)
        pair.restart(victim)
        pair.hand_over(num_tries=3)
        if old_params is not None:
            self.check_old_promise(pair, old_params, old_prompt)
        pair.prefill.settle()
        pair.decode.settle()

    def check_old_promise(self, pair: Pair, params: dict[str, Any], prompt: list[int]) -> None:
        """What was promised in another life is not waited for."""
        started_s = time.monotonic()
        result = pair.decode.result(pair.decode.add(prompt, params))
        assert time.monotonic() - started_s < 30.0
        assert (result["tokens"], result["num_external"]) == (expected(prompt), 0)

    def kill_at(self, pair: Pair, mode: str, moment: str, victim: str) -> None:
        prompt = new_prompt()
        params = pair.prefill.prefill(prompt)
        mover, dying = (pair.decode if mode == "pull" else pair.prefill), getattr(pair, victim)
        if moment == "during":
            mover.ask("gate", "arm")
        elif moment == "before":
            dying.kill()
            if victim == "decode":
                return
        started_s = time.monotonic()
        request_id = pair.decode.add(prompt, params, LONG)
        if moment == "during":
            mover.half()
            dying.kill()
            if mover is not dying:
                mover.ask("gate", "open")
        elif moment == "after":
            pair.decode.until(lambda state: not state["num_loads"] or not state["consumer"])
            dying.kill()
        if victim == "prefill":
            result = pair.decode.result(request_id)
            assert time.monotonic() - started_s < 30.0
            assert result["tokens"] == expected(prompt, LONG)
            assert result["num_external"] == (PROMPT_TOKENS if moment == "after" else 0)

    @pytest.mark.parametrize("moment", MOMENTS)
    def test_prefill_engine_stopped_during_pulls(self, pair: Pair, moment: str) -> None:
        pair.start("pull", num_tries=3, **NEAR)
        prompt = new_prompt()
        params = pair.prefill.prefill(prompt)
        if moment == "before":
            pair.prefill.stop()
        pair.decode.ask("gate", "arm") if moment == "during" else None
        request_id = pair.decode.add(prompt, params, LONG)
        if moment == "during":
            pair.decode.half()
            pair.prefill.stop()
            pair.decode.ask("gate", "open")
        elif moment == "after":
            pair.decode.until(lambda state: not state["consumer"])
            pair.prefill.stop()
        started_s = time.monotonic()
        result = pair.decode.result(request_id)
        assert time.monotonic() - started_s < 40.0
        assert result["tokens"] == expected(prompt, LONG)
        assert (result["num_external"] == 0) == (moment != "after")
        pair.decode.settle()  # it does not need the other for that
        pair.prefill.go_on()
        pair.prefill.settle()
        pair.hand_over(num_tries=3)

    @pytest.mark.parametrize(("moment", "end"), [("before", "go on"), ("during", "go on"), ("during", "kill")])
    def test_prefill_engine_stopped_during_pushes(self, pair: Pair, moment: str, end: str) -> None:
        """What it may write to later stays out of use until it has said that it will not, or is dead."""
        pair.start("push", num_tries=3, **NEAR)
        prompt = new_prompt()
        params = pair.prefill.prefill(prompt)
        if moment == "before":
            pair.prefill.stop()
            request_id = pair.decode.add(prompt, params)
        else:
            pair.prefill.ask("gate", "arm")
            request_id = pair.decode.add(prompt, params)
            pair.prefill.half()
            pair.prefill.stop()
        started_s = time.monotonic()
        result = pair.decode.result(request_id)
        assert time.monotonic() - started_s < 40.0
        assert (result["tokens"], result["num_external"]) == (expected(prompt), 0)
        time.sleep(5 * NEAR["quarantine_s"])
        state = pair.decode.ask("state")
        assert state["pinned_blocks"] == state["lost_blocks"] == state["told_held_blocks"] == BLOCKS
        prompts = [new_prompt() for _ in range(2)]  # for all blocks that are left
        request_ids = [pair.decode.add(prompt, max_tokens=LONG) for prompt in prompts]
        if end == "kill":
            pair.prefill.kill()
        else:
            pair.prefill.go_on()
            pair.prefill.ask("gate", "open")
            pair.prefill.settle()
        for prompt, request_id in zip(prompts, request_ids, strict=True):
            assert pair.decode.result(request_id)["tokens"] == expected(prompt, LONG)
        pair.decode.settle()
        if end == "kill":
            pair.restart("prefill")
        pair.hand_over(num_tries=3)

    def test_prefill_engine_stopped_after_a_push(self, pair: Pair) -> None:
        """What has come is used, and nothing waits for the other."""
        pair.start("push", num_tries=3, **NEAR)
        prompt = new_prompt()
        request_id = pair.decode.add(prompt, pair.prefill.prefill(prompt), LONG)
        pair.decode.until(lambda state: not state["consumer"])
        pair.prefill.stop()
        result = pair.decode.result(request_id)
        assert (result["tokens"], result["num_external"]) == (expected(prompt, LONG), PROMPT_TOKENS)
        pair.decode.settle()
        pair.prefill.go_on()
        pair.prefill.settle()
        pair.hand_over(num_tries=3)

    @pytest.mark.parametrize("moment", MOMENTS)
    @pytest.mark.parametrize("mode", MODES)
    def test_decode_engine_stopped(self, pair: Pair, mode: str, moment: str) -> None:
        """Until all promises to it are over, and its blocks are others'; what it reads then does not count."""
        pair.start(mode, num_tries=3, **NEAR | {"load_s": 40.0})
        prompt = new_prompt()
        params = pair.prefill.prefill(prompt)
        mover = pair.decode if mode == "pull" else pair.prefill
        if moment == "before":
            pair.decode.stop()
        elif moment == "during":
            mover.ask("gate", "arm")
        request_id = pair.decode.add(prompt, params, LONG)
        if moment == "during":
            mover.half()
        elif moment == "after":
            pair.decode.until(lambda state: not state["consumer"])
        pair.decode.stop()
        if moment == "during" and mode == "push":
            mover.ask("gate", "open")
        pair.prefill.settle()
        pair.decode.go_on()
        pair.decode.ask("gate", "open")
        result = pair.decode.result(request_id)
        assert result["tokens"] == expected(prompt, LONG)
        if (mode, moment) != ("push", "during"):
            assert (result["num_external"] == 0) == (moment != "after")
        pair.decode.settle()
        pair.hand_over(num_tries=3)

    def test_a_slow_reader_that_lives_keeps_its_claim(self, pair: Pair) -> None:
        pair.start("pull", num_tries=3, **NEAR | {"load_s": 40.0})
        prompt = new_prompt()
        params = pair.prefill.prefill(prompt)
        pair.decode.ask("gate", "arm")
        request_id = pair.decode.add(prompt, params)
        pair.decode.half()
        time.sleep(9.0)  # longer than lease and claim
        pair.prefill.compute()
        pair.decode.ask("gate", "open")
        result = pair.decode.result(request_id)
        assert (result["tokens"], result["num_external"]) == (expected(prompt), PROMPT_TOKENS)
        pair.prefill.settle()
        pair.decode.settle()

    @pytest.mark.parametrize(("what", "mode"), [("kill", "pull"), ("kill", "push"), ("stop", "push")])
    def test_where_loads_must_not_fail_the_request_ends_with_an_error(self, pair: Pair, mode: str, what: str) -> None:
        pair.start(mode, "fail", num_tries=3, **FAR | {"load_s": 10.0})
        prompt = new_prompt()
        params = pair.prefill.prefill(prompt)
        mover = pair.decode if mode == "pull" else pair.prefill
        mover.ask("gate", "arm")
        request_id = pair.decode.add(prompt, params)
        mover.half()
        getattr(pair.prefill, what)()
        if mode == "pull":
            mover.ask("gate", "open")
        result = pair.decode.result(request_id)
        assert (result["tokens"], result["reason"]) == ([], "error")
        assert result["error"]
        if what == "stop":
            pair.prefill.kill()
        pair.decode.settle()
