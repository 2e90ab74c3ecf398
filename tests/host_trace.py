"""The scenarios of the host trace, the same for every host, and what the trace looks like as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kvferry.testing.recorder import Record, Script

BLOCK_SIZE = 32
BUDGET_TOKENS = 64
NUM_BLOCKS = {"single": 10, "hybrid": 28}
"""The null block included: 9 for each of the one or three groups, so that two requests of 129 tokens do not fit."""
MAX_MODEL_LEN = 256
_STEP_LIMIT = 60

Section = dict[str, Any]
"""{"do": what was done to the engine, "calls": the hooks that were called then}."""


class Host(Protocol):
    """An engine with the recording connector."""

    def add(self, key: str, token_ids: list[int], max_tokens: int) -> None:
        """Add a request (greedy, end-of-sequence ignored)."""

    def abort(self, key: str) -> None:
        """Abort a request."""

    def step(self) -> None:
        """One step."""

    def has_requests(self) -> bool:
        """Whether the engine would go on stepping."""

    def reset_prefix_cache(self) -> bool:
        """Forget the engine's own prefix cache."""


class Driver:
    """Does things to a host and notes which hooks were called meanwhile."""

    def __init__(self, host: Host, record: Record) -> None:
        self.record = record
        self.sections: list[Section] = []
        self._host = host

    def add(self, key: str, num_tokens: int, max_tokens: int = 3, seed: int | None = None) -> None:
        """A request whose prompt is the same for the same `seed` (default: of the key), as far as it goes."""
        start = (int(key[1:]) if seed is None else seed) * 97
        tokens = [(start + i * 31 + i * i) % 900 for i in range(num_tokens)]
        self._do(f"add {key}", lambda: self._host.add(key, tokens, max_tokens))

    def abort(self, key: str) -> None:
        self._do(f"abort {key}", lambda: self._host.abort(key))

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self._do("step", self._host.step)

    def finish(self) -> None:
        """Step until nothing is left to do."""
        for _ in range(_STEP_LIMIT):
            if not self._do("has_requests", self._host.has_requests):
                return
            self.step()
        raise AssertionError(f"the engine still has requests after {_STEP_LIMIT} steps:\n{self.sections[-1]}")

    def _do(self, what: str, action: Callable[[], Any]) -> Any:
        self.record.calls.clear()
        answer = action()
        self.sections.append({"do": what, "calls": self.record.lines()})
        return answer


def cold(run: Driver) -> None:
    run.add("r1", 70)
    run.finish()


def warm_sync(run: Driver) -> None:
    run.record.script.hit_tokens = 64
    run.add("r1", 70)
    run.finish()


def warm_behind_local_hit(run: Driver) -> None:
    run.add("r1", 40, seed=5)
    run.finish()
    run.record.script.hit_tokens = 64
    run.add("r2", 100, seed=5)
    run.finish()


def async_load(run: Driver) -> None:
    run.record.script = Script(hit_tokens=64, is_async=True, load_steps=2)
    run.add("r1", 70)
    run.finish()


def async_whole_prompt(run: Driver) -> None:
    run.record.script = Script(hit_tokens=64, is_async=True)
    run.add("r1", 64)
    run.finish()


def still_looking(run: Driver) -> None:
    run.record.script = Script(hit_tokens=64, looking_times=2)
    run.add("r1", 70)
    run.add("r2", 80)
    run.finish()


def failed_sync_blocks(run: Driver) -> None:
    run.record.script = Script(hit_tokens=64, failure="blocks")
    run.add("r1", 70)
    run.finish()


def failed_async_blocks(run: Driver) -> None:
    run.record.script = Script(hit_tokens=64, is_async=True, failure="blocks")
    run.add("r1", 70)
    run.finish()


def failed_async_request(run: Driver) -> None:
    run.record.script = Script(hit_tokens=64, is_async=True, load_steps=1, failure="request")
    run.add("r1", 70)
    run.finish()


def preempt(run: Driver) -> None:
    run.add("r1", 125, max_tokens=8)
    run.add("r2", 125, max_tokens=8)
    run.finish()


def preempt_and_load(run: Driver) -> None:
    run.record.script.hit_tokens = 32
    run.add("r1", 125, max_tokens=8)
    run.add("r2", 125, max_tokens=8)
    run.finish()


def abort_running(run: Driver) -> None:
    run.add("r1", 70, max_tokens=8)
    run.step(3)
    run.abort("r1")
    run.finish()


def abort_waiting(run: Driver) -> None:
    run.add("r1", 70)
    run.abort("r1")
    run.finish()


def abort_loading(run: Driver) -> None:
    run.record.script = Script(hit_tokens=64, is_async=True, load_steps=3)
    run.add("r1", 70)
    run.step(2)
    run.abort("r1")
    run.step()
    run.finish()


def delayed_free(run: Driver) -> None:
    run.record.script.send_steps = 2
    run.add("r1", 70)
    run.finish()


SCENARIOS: dict[str, Callable[[Driver], None]] = {
    scenario.__name__: scenario
    for scenario in (
        cold,
        warm_sync,
        warm_behind_local_hit,
        async_load,
        async_whole_prompt,
        still_looking,
        failed_sync_blocks,
        failed_async_blocks,
        failed_async_request,
        preempt,
        preempt_and_load,
        abort_running,
        abort_waiting,
        abort_loading,
        delayed_free,
    )
}
NOT_HYBRID = {"failed_sync_blocks", "failed_async_blocks"}
"""vLLM ends the engine when block ids are reported as bad and there are several KV groups."""


def run_scenario(name: str, host: Host, record: Record) -> list[Section]:
    """Run one scenario on an idle engine with an empty prefix cache; leaves it so."""
    record.script = Script()
    driver = Driver(host, record)
    SCENARIOS[name](driver)
    record.script = Script()
    record.forget()
    assert host.reset_prefix_cache(), f"{name} left blocks behind"
    record.forget()
    return driver.sections
