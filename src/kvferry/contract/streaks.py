"""When a connector is switched off for what its hooks raise: one rule for all hosts."""

from __future__ import annotations


class Streaks:
    """Counts per hook in how many steps in a row it failed.

    The rule: a connector is switched off when a hook has failed (raised, or broken a clause) in each of the last
    `limit` steps in which it was called. How often it failed within a step, and steps in which it was not called, do
    not count.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._called: set[str] = set()
        self._failed: dict[str, str] = {}
        self._streaks: dict[str, int] = {}

    def note_call(self, hook: str) -> None:
        """A hook is called in this step."""
        self._called.add(hook)

    def note_failure(self, hook: str, failure: str) -> None:
        """A hook failed in this step."""
        self._called.add(hook)
        self._failed[hook] = failure

    def end_step(self) -> str:
        """Count the step that ends. Why the connector must be switched off now, or an empty string."""
        reason = ""
        for hook in sorted(self._called):
            self._streaks[hook] = self._streaks.get(hook, 0) + 1 if hook in self._failed else 0
            if self._streaks[hook] >= self._limit:
                reason = f"{hook} failed in {self._limit} steps in a row, at last: {self._failed[hook]}"
        self._called.clear()
        self._failed.clear()
        return reason
