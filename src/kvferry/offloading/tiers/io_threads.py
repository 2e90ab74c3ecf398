"""Threads of a tier that does blocking I/O: loads before stores before chores, one outcome for every action."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from kvferry.errors import TierUnavailable

W = TypeVar("W")


class Urgency(IntEnum):
    """Queues, the most urgent first: somebody waits for a load, nobody for a chore."""

    LOAD = 0
    STORE = 1
    CHORE = 2


@dataclass(slots=True)
class Done(Generic[W]):
    """A piece of work that is over. `error` is what its action raised."""

    work: W
    error: Exception | None
    seconds: float


class IoThreads(Generic[W]):
    """Runs `action` on each submitted piece of work, on daemon threads of its own.

    `submit` and `take_done` never wait (beyond a lock held for microseconds); `drain` and `close` do.
    """

    def __init__(self, name: str, num_threads: int, action: Callable[[W], None]) -> None:
        self._action = action
        self._queues: tuple[deque[W], ...] = tuple(deque() for _ in Urgency)
        self._done: deque[Done[W]] = deque()
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._is_idle = threading.Condition(self._lock)
        self._num_running = 0
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, urgency: Urgency, work: W) -> None:
        """Queue it. After `close` it is over at once, with TierUnavailable."""
        with self._lock:
            if self._is_closing:
                self._done.append(Done(work, TierUnavailable("the tier is closed"), 0.0))
            else:
                self._queues[urgency].append(work)
                self._has_work.notify()

    def num_queued(self, urgency: Urgency) -> int:
        """How many wait in that queue (without those being run)."""
        return len(self._queues[urgency])

    def take_done(self) -> list[Done[W]]:
        """All that ended since the last call."""
        done = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or running (True), at most `timeout_s` seconds (False)."""
        with self._lock:
            return self._is_idle.wait_for(lambda: not self._num_running and not any(self._queues), timeout_s)

    def close(self, timeout_s: float) -> bool:
        """End queued loads and stores with TierUnavailable, wait for what runs and for the chores.

        False when a thread is stuck: it stays so, and its work may never be reported.
        """
        with self._lock:
            self._is_closing = True
            for queue in self._queues[: Urgency.CHORE]:
                self._done.extend(Done(work, TierUnavailable("the tier was closed"), 0.0) for work in queue)
                queue.clear()
            self._has_work.notify_all()
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _take(self) -> W | None:
        with self._lock:
            self._has_work.wait_for(lambda: self._is_closing or any(self._queues))
            for queue in self._queues:
                if queue:
                    self._num_running += 1
                    return queue.popleft()
            return None

    def _run(self) -> None:
        while (work := self._take()) is not None:
            error: Exception | None = None
            started_s = time.perf_counter()
            try:
                self._action(work)
            except Exception as raised:  # a thread's main: the owner is told, whatever it was
                error = raised
            done = Done(work, error, time.perf_counter() - started_s)
            del work  # an idle thread must not keep a slot's buffer alive
            with self._lock:
                self._num_running -= 1
                self._done.append(done)
                if not self._num_running:
                    self._is_idle.notify_all()
            del done, error
