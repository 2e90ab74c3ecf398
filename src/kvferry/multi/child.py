"""One child of a MultiConnector behind a guard: what it raises or answers wrongly is its own affair."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvferry.contract.base import KVConnectorBase_V1, supports_hma
from kvferry.contract.stats import ConnectorStats
from kvferry.errors import ContractError

logger = logging.getLogger(__name__)

MAX_ERRORS = 5
"""A child whose hooks raised this often is switched off."""


class Child:
    """Calls one child's hooks and counts what goes wrong. Switches the child off after MAX_ERRORS exceptions.

    A child that is off claims and saves nothing any more. In the next step it is closed: shut down on its workers, then
    in the scheduler. Nothing of it runs then, so its loads have failed, and its sends and pins are over.
    """

    def __init__(self, index: int, label: str, connector: KVConnectorBase_V1) -> None:
        self.index = index
        self.label = label
        self.connector = connector
        self.is_hma = supports_hma(connector)
        self.num_errors = 0
        self.num_worker_errors = 0
        """On a scheduler instance: what its workers' hooks raised."""
        self.num_broken_answers = 0
        self.is_off = False
        self.is_closed = False
        """Shut down: no hook is called any more, and nothing of it runs."""
        self._close_failed = False

    def close(self) -> bool:
        """Shut the child down, once. False when that raised: what it has under way may still run, for ever."""
        if not self.is_closed and not self._close_failed:
            self._close_failed = self.tell("shutdown") is not None
            self.is_closed = not self._close_failed
        return self.is_closed

    @property
    def is_closing(self) -> bool:
        """Off, and yet to be closed."""
        return self.is_off and not (self.is_closed or self._close_failed)

    def tell(self, hook: str, *args: Any, **kwargs: Any) -> Exception | None:
        """Call a hook without an answer. What it raised, already logged and counted, or None."""
        return None if self.is_closed else self._attempt(hook, args, kwargs)[1]

    def ask(
        self,
        hook: str,
        default: Any,
        *args: Any,
        check: Callable[[Any], str | None] | None = None,
        reads: Callable[[Any], Any] | None = None,
    ) -> Any:
        """The hook's answer, or `default` when it raises, or when `check` names a clause that the answer breaks."""
        return self.ask_or_error(hook, default, *args, check=check, reads=reads)[0]

    def ask_or_error(
        self,
        hook: str,
        default: Any,
        *args: Any,
        check: Callable[[Any], str | None] | None = None,
        reads: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, Exception | None]:
        """As `ask`, with the exception or ContractError beside the default. `reads` is part of the guarded call."""
        if self.is_closed:
            return default, None
        answer, error = self._attempt(hook, args, {}, reads)
        if error is not None:
            return default, error
        broken = check(answer) if check is not None else None
        if broken is None:
            return answer, None
        self.num_broken_answers += 1
        contract_error = ContractError(
            f"{self.label} ({type(self.connector).__name__}).{hook} answered {answer!r}: {broken}"
        )
        logger.error("%s; the engine continues without it", contract_error)
        return default, contract_error

    def _attempt(
        self, hook: str, args: tuple[Any, ...], kwargs: dict[str, Any], reads: Callable[[Any], Any] | None = None
    ) -> tuple[Any, Exception | None]:
        try:
            answer = getattr(self.connector, hook)(*args, **kwargs)
            return (answer if reads is None else reads(answer)), None
        except Exception as err:  # a host hook: one child's fault must not stop the others
            self.num_errors += 1
            logger.exception("%s of MultiConnector's child %s failed", hook, self.label)
            if self.num_errors >= MAX_ERRORS:
                self.switch_off(f"its hooks raised {self.num_errors} times")
            return None, err

    def switch_off(self, reason: str) -> None:
        """No more claims or saves. Idempotent."""
        if not self.is_off:
            self.is_off = True
            logger.error("MultiConnector's child %s is switched off: %s", self.label, reason)

    def stats(self, answer: Any, *, with_errors: bool) -> ConnectorStats | None:
        """The child's statistics, with what the guard counted among `fallbacks`; None when there is neither."""
        if answer is not None and not isinstance(answer, ConnectorStats):
            logger.debug("%s: statistics of type %s are left out", self.label, type(answer).__name__)
            answer = None
        known: ConnectorStats | None = answer
        counts = {
            "hook raised": self.num_errors + self.num_worker_errors,
            "answer broke the contract": self.num_broken_answers,
            "switched off": int(self.is_off),
        }
        counts = {reason: times for reason, times in counts.items() if times}
        if not (with_errors and counts):
            return known
        own = known or ConnectorStats()
        return replace(own, fallbacks={**own.fallbacks, **counts})
