"""Makes host-facing connector classes out of the hook table: each hook converts its arguments and calls a side."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from kvferry.contract.hooks import HOOKS, Hook, HookSide, named_after_hook
from kvferry.contract.host import host_info
from kvferry.contract.sides import SchedulerSide, WorkerSide
from kvferry.contract.views import request_view
from kvferry.errors import ConfigError, ContractError

logger = logging.getLogger(__name__)


def facade_mixin(scheduler_side: type[SchedulerSide], worker_side: type[WorkerSide], scheduler_role: Any) -> type[Any]:
    """A mixin that implements every instance hook of the table over the two sides.

    Put it before the host's connector base in the bases of the final class. `scheduler_role` is the host's
    `KVConnectorRole.SCHEDULER`. Hooks called on the wrong role raise ContractError.
    """

    class HookFacade:
        __doc__ = f"Facade over {scheduler_side.__name__} and {worker_side.__name__}."
        sides = scheduler_side, worker_side

        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
            super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]  # the host's base is next
            host = host_info(vllm_config, kv_cache_config)
            is_scheduler = role == scheduler_role
            # Once per engine and role: ranks that probe one port at one time would find it taken.
            if host.rank == 0 and (problems := scheduler_side.check(host)):
                raise ConfigError("; ".join(problems))
            self._no_hits_reason = host.no_hits_reason
            if is_scheduler and host.no_hits_reason:
                logger.warning("nothing is loaded for this model: %s", host.no_hits_reason)
            self._scheduler_side = scheduler_side(host) if is_scheduler else None
            self._worker_side = None if is_scheduler else worker_side(host)

        @property
        def side(self) -> SchedulerSide | WorkerSide:
            """The side behind this instance, for looking at its state."""
            side = self._scheduler_side or self._worker_side
            assert side is not None
            return side

    for hook in HOOKS:
        if hook.side is not HookSide.CLASS and not hook.bound_by_facade:
            method = _delegate(hook)
            setattr(HookFacade, hook.name, property(method) if hook.is_property else method)
    HookFacade.get_num_new_matched_tokens = _unless_useless(HookFacade.get_num_new_matched_tokens)  # type: ignore[attr-defined]
    return HookFacade


def _unless_useless(ask: Callable[..., Any]) -> Callable[..., Any]:
    """No hits for requests that cannot use them, whatever the connector: one rule, here."""

    @functools.wraps(ask)
    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Any:
        if self._no_hits_reason is not None or request_view(request).skip_reading_prefix_cache:
            return 0, False
        return ask(self, request, num_computed_tokens)

    return get_num_new_matched_tokens


def _delegate(hook: Hook) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        side = _side(self, hook)
        if hook.is_property:
            return getattr(side, hook.method)
        if hook.passes_metadata:
            return getattr(side, hook.method)(self._get_connector_metadata())
        if hook.converts:
            args = _convert(hook, args)
        if hook.side is HookSide.WORKER:
            kwargs = {}  # what runners add by keyword differs between them; no side needs it
        return getattr(side, hook.method)(*args, **kwargs)

    return named_after_hook(call, "HookFacade", hook.name)


def _convert(hook: Hook, args: tuple[Any, ...]) -> tuple[Any, ...]:
    head = [arg if fn is None else fn(arg) for fn, arg in zip(hook.converts, args, strict=False)]
    return (*head, *args[len(head) :])


def _side(connector: Any, hook: Hook) -> SchedulerSide | WorkerSide:
    scheduler: SchedulerSide | None = connector._scheduler_side
    worker: WorkerSide | None = connector._worker_side
    side = {HookSide.SCHEDULER: scheduler, HookSide.WORKER: worker}.get(hook.side, scheduler or worker)
    if side is None:
        raise ContractError(
            f"{type(connector).__name__}.{hook.name} is a {hook.side.value} hook, called on the other role"
        )
    return side
