"""Who fails is left alone for a while, longer each time, and then tried with one request at a time."""

from __future__ import annotations

import enum

from kvferry.clock import Clock


class State(enum.Enum):
    """Of a breaker."""

    CLOSED = "in rotation"  # requests go through
    OPEN = "out of rotation"  # none do
    TRIAL = "on trial"  # one does, to find out


class EngineBreaker:
    """A circuit breaker with exponential backoff. One thread.

    `begin` before using what it guards; then `succeeded` or `failed` when that is known, `abandoned` at the end.
    """

    def __init__(self, clock: Clock, threshold: int, min_backoff_s: float, max_backoff_s: float) -> None:
        """`threshold`: failures in a row that open it."""
        self.state = State.CLOSED
        self._clock = clock
        self._threshold = threshold
        self._backoffs_s = (min_backoff_s, max_backoff_s)
        self._backoff_s = min_backoff_s
        self._num_failures = 0
        self._retry_s = 0.0
        self._num_trials = 0

    @property
    def is_available(self) -> bool:
        """True when a request may go through now."""
        return self.state is State.CLOSED or (self.state is State.OPEN and self._clock.now() >= self._retry_s)

    @property
    def wait_s(self) -> float:
        """Until it may be tried; 0 when it may now."""
        return 0.0 if self.is_available else max(0.0, self._retry_s - self._clock.now())

    def begin(self) -> int:
        """A request goes through; the number of its trial when it is the one that finds out, else 0."""
        if self.state is not State.OPEN or not self.is_available:
            return 0
        self.state = State.TRIAL
        self._num_trials += 1
        return self._num_trials

    def succeeded(self) -> None:
        """It worked: closed."""
        self.state, self._num_failures, self._backoff_s = State.CLOSED, 0, self._backoffs_s[0]

    def failed(self) -> bool:
        """It did not; True when that opened a breaker that was closed."""
        self._num_failures += 1
        if self.state is State.CLOSED and self._num_failures < self._threshold:
            return False
        was_closed = self.state is State.CLOSED
        if self.state is not State.OPEN:  # a straggler from before it opened says nothing new
            self.state = State.OPEN
            self._retry_s = self._clock.now() + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, self._backoffs_s[1])
        return was_closed

    def abandoned(self, trial: int) -> None:
        """The request whose `begin` answered `trial` has ended: if nothing was found out, the next one tries."""
        if self.state is State.TRIAL and trial == self._num_trials:
            self.state = State.OPEN
