"""The border to a connector: guarded calls of its hooks, what went wrong there, and the breaker that ends it.

A hook that raises, and an answer that breaks the contract, is logged, counted and answered for with a default. When
one hook fails again and again, the breaker switches the connector off; the engine goes on as if it had none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from kvferry.contract import KVConnectorBase_V1
from kvferry.contract.clauses import Clause
from kvferry.contract.streaks import Streaks
from kvferry.errors import ContractError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class HostCounters:
    """What went wrong at the border to the connector, since start."""

    hook_errors: dict[str, int] = field(default_factory=dict)
    """Exceptions per hook."""
    contract_errors: dict[str, int] = field(default_factory=dict)
    """Answers that broke the contract, per hook."""
    unknown_completions: int = 0
    """Completions and failures of requests this engine never had (each such report is also a contract error)."""
    late_completions: int = 0
    """Completions and failures of requests that were not waiting for one (late or repeated)."""
    load_failures: int = 0
    """Loads that failed or ran out of time."""
    late_transfers: int = 0
    """Transfers that did not end by their deadline although their request is gone; their blocks stay held."""
    quarantined_blocks: int = 0
    """Blocks lost for good, because the connector could not be shut down while it held them."""
    switched_off: dict[str, str] = field(default_factory=dict)
    """Connector -> why it was switched off. Empty while all is well."""


class ConnectorBreaker:
    """Decides when a connector is switched off (`Streaks` has the rule); shared by the guards of its two instances."""

    def __init__(self, limit: int, counters: HostCounters) -> None:
        self.counters = counters
        self.is_off = False
        self.guards: list[EngineGuard] = []
        """In the order of shutdown: worker, scheduler."""
        self.streaks = Streaks(limit)
        self._reason = ""

    def condemn(self, reason: str) -> None:
        """Have the connector switched off at the end of this step, whatever failed how often."""
        self._reason = self._reason or reason

    def end_step(self) -> bool:
        """Count the step that ends. True when the connector must be switched off now."""
        reason = self.streaks.end_step()
        self._reason = self._reason or reason
        return bool(self._reason) and not self.is_off

    def switch_off(self, reason: str = "") -> bool:
        """Shut both instances down; no hook is called from now on. False when the worker instance failed to stop.

        Only then may a copy of the connector's still run. `reason`: when it is not that a hook failed too often.
        """
        self.is_off = True
        self._reason = reason or self._reason
        name = self.guards[0].name
        self.counters.switched_off[name] = self._reason
        logger.error("%s is switched off; the engine continues without the connector: %s", name, self._reason)
        worker_stopped, _ = [guard.shutdown() for guard in self.guards]
        return worker_stopped


class EngineGuard:
    """Calls hooks of one connector instance; never raises."""

    def __init__(self, connector: KVConnectorBase_V1, breaker: ConnectorBreaker) -> None:
        self.connector = connector
        self.counters = breaker.counters
        self.failed_hooks: set[str] = set()
        """Hooks that failed since the owner last cleared this."""
        self._breaker = breaker
        self._is_shut_down = False
        breaker.guards.append(self)

    @property
    def name(self) -> str:
        """The connector's name, as errors show it."""
        return type(self.connector).__name__

    @property
    def is_off(self) -> bool:
        """True once the connector is switched off: `call` answers with defaults only."""
        return self._breaker.is_off

    def call(self, hook: str, default: Any, *args: Any, check: Clause | None = None, **kwargs: Any) -> Any:
        """The hook's answer, or `default` when it raises, `check` names a broken clause, or the connector is off."""
        if self._breaker.is_off:
            return default
        self._breaker.streaks.note_call(hook)
        try:
            answer = getattr(self.connector, hook)(*args, **kwargs)
        except Exception as err:  # a host hook: a plugin's fault must not end the engine
            self._count(self.counters.hook_errors, hook, f"{type(err).__name__}: {err}")
            logger.exception("%s.%s failed; the engine continues without it", self.name, hook)
            return default
        clause = check(answer) if check is not None else None
        if clause is None:
            return answer
        self.breach(hook, f"answered {answer!r}: {clause}")
        return default

    def breach(self, hook: str, what: str) -> None:
        """Note that a hook broke the contract: a ContractError in the log, counted."""
        self._count(self.counters.contract_errors, hook, what)
        logger.error("%s; the engine continues without it", ContractError(f"{self.name}.{hook} {what}"))

    def shutdown(self) -> bool:
        """Shut the instance down, once; also when it is off. False when that raised."""
        if not self._is_shut_down:
            self._is_shut_down = True
            try:
                self.connector.shutdown()
            except Exception as err:  # a host hook, as above
                self._count(self.counters.hook_errors, "shutdown", f"{type(err).__name__}: {err}")
                logger.exception("%s.shutdown failed", self.name)
                return False
        return True

    def _count(self, counts: dict[str, int], hook: str, failure: str) -> None:
        counts[hook] = counts.get(hook, 0) + 1
        self.failed_hooks.add(hook)
        self._breaker.streaks.note_failure(hook, failure)
