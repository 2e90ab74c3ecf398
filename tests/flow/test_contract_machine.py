"""Ten thousand steps through the contract without a fault, and mutants that must not survive them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.flow.contract_machine import ContractMachine, GroupsMachine, fired

from kvferry.contract.pins import PinLedger
from kvferry.engine.block_pool import BlockPool
from kvferry.engine.kv_manager import KVManager
from kvferry.engine.scheduler import Scheduler
from kvferry.engine.transfers import Transfers
from kvferry.multi.requests import Completions

NUM_WALKS, NUM_RULES = 300, 60
NUM_GROUP_WALKS = 150


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The faults would fill the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def walk(num_walks: int, machine: type[ContractMachine] = ContractMachine) -> None:
    """The same walks on every run; hypothesis prints the steps of one that fails."""
    options = settings(
        max_examples=num_walks,
        stateful_step_count=NUM_RULES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)


def rules() -> list[str]:
    return [name for name, value in vars(ContractMachine).items() if hasattr(value, "hypothesis_stateful_rule")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_steps_leak_nothing_and_tell_no_lie() -> None:
    fired.clear()
    walk(NUM_WALKS)
    for what, num in fired.most_common():
        print(f"{num:6} {what}")
    assert fired["step"] >= 10_000
    assert {name: fired[name] for name in rules() if fired[name] < 100} == {}
    assert min(fired[f"walk: {runner}"] for runner in ("V1", "V2", "V2 with kernel blocks")) >= NUM_WALKS // 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_steps_with_three_groups_leak_nothing_and_tell_no_lie() -> None:
    fired.clear()
    walk(NUM_GROUP_WALKS, GroupsMachine)
    for what, num in fired.most_common():
        print(f"{num:6} {what}")
    assert fired["step"] >= 4_000
    assert {name: fired[name] for name in rules() if fired[name] < 50} == {}


# ---- mutants: each breaks one thing that the machine must notice ----------------------------------------------------


def _double_free(original: Callable[..., Any]) -> Callable[..., Any]:
    def release(self: Any, request_id: str, blocks: list[Any], *args: Any, **kwargs: Any) -> None:
        original(self, request_id, blocks, *args, **kwargs)
        self._pool.free_blocks([block for block in blocks if block.ref_cnt > 0])

    return release


def _early_free_of_a_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def release(self: Any, request_id: str, blocks: Any, awaits_sending: bool, awaits_recving: bool) -> None:
        original(self, request_id, blocks, awaits_sending, False)

    return release


def _lost_completion(original: Callable[..., Any]) -> Callable[..., Any]:
    def take(self: Any) -> Any:
        due = original(self)
        due.finished_sending = set(list(due.finished_sending)[1:])
        return due

    return take


def _one_report_is_enough(original: Callable[..., Any]) -> Callable[..., Any]:
    def sent(self: Any, child: int, request_id: str) -> None:
        self._sends[request_id] = {child}
        original(self, child, request_id)

    return sent


def _wrong_kind(original: Callable[..., Any]) -> Callable[..., Any]:
    def release(self: Any, request_id: str, blocks: Any, awaits_sending: bool, awaits_recving: bool) -> None:
        original(self, request_id, blocks, awaits_recving, awaits_sending)

    return release


def _failed_load_counts(original: Callable[..., Any]) -> Callable[..., Any]:
    def received(self: Any, child: int, request_id: str, *, has_failed: bool = False) -> None:
        if request_id in self._loads:
            self._loads[request_id].has_failed = False
        original(self, child, request_id)

    return received


def _nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: None


def _no_strikes(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: set()


def _keeps_last_block(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, request_id: original(self, request_id)[1:]


def _stale_content(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_new_blocks(self: Any, num_blocks: int) -> Any:
        cached = dict(self._cached)
        blocks = original(self, num_blocks)
        self._cached.update((key, block) for key, block in cached.items() if block in blocks)
        return blocks

    return get_new_blocks


def _published_unproved(original: Callable[..., Any]) -> Callable[..., Any]:
    def try_admit(self: Any, request: Any, *args: Any) -> Any:
        admitted = original(self, request, *args)
        self.manager.cache_blocks(request, request.num_computed_tokens)
        return admitted

    return try_admit


def _keeps_count(original: Callable[..., Any]) -> Callable[..., Any]:
    def preempt(self: Any, request: Any, plan: Any) -> None:
        num_computed = request.num_computed_tokens
        original(self, request, plan)
        request.num_computed_tokens = num_computed // 4 * 4

    return preempt


def _frees_too_early(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, request_id, num_tokens: original(self, request_id, num_tokens + self.block_size)


def _goes_on_anywhere(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, request_id, num_tokens: True


def _only_full_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    def first_bad_token(self: Any, request_id: str, bad_block_ids: set[int]) -> int | None:
        full = {block for table in self.get_block_ids(request_id)[:1] for block in table}
        return original(self, request_id, bad_block_ids & full)

    return first_bad_token


def _forgets_to_null(original: Callable[..., Any]) -> Callable[..., Any]:
    def free_unneeded(self: Any, request_id: str, num_tokens: int) -> None:
        tables = [list(table) for table in self._table(request_id)]
        original(self, request_id, num_tokens)
        for table, before in zip(self._table(request_id), tables, strict=True):
            table[:] = before

    return free_unneeded


GROUP_MUTANTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a window leaves a block too early": (KVManager, "free_unneeded", _frees_too_early),
    "a cut request goes on without its window's tail": (KVManager, "can_continue", _goes_on_anywhere),
    "bad blocks of window groups are not noticed": (KVManager, "first_bad_token", _only_full_groups),
    "freed blocks stay in the table": (KVManager, "free_unneeded", _forgets_to_null),
}


MUTANTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "blocks of a send are freed twice": (Transfers, "release", _double_free),
    "blocks of an aborted load are freed at once": (Transfers, "release", _early_free_of_a_load),
    "a finished send is lost": (Completions, "take", _lost_completion),
    "one child's send ends all children's": (Completions, "_sent", _one_report_is_enough),
    "a failed load counts as a good one": (Completions, "_received", _failed_load_counts),
    "blocks wait for the wrong kind of completion": (Transfers, "release", _wrong_kind),
    "pins do not hold": (PinLedger, "touch", _nothing),
    "bad blocks are not computed again": (Scheduler, "_strike_bad_blocks", _no_strikes),
    "a block of each request is not given back": (KVManager, "detach", _keeps_last_block),
    "blocks handed out are still found by their old content": (BlockPool, "get_new_blocks", _stale_content),
    "blocks are findable before their load is proved": (Scheduler, "_try_admit", _published_unproved),
    "a preempted request keeps its count of computed tokens": (Scheduler, "_preempt", _keeps_count),
    "pins of a dead connector stay": (PinLedger, "release_all", _nothing),
    "a connector's end is not told to its requests": (Completions, "_give_up", _nothing),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*MUTANTS, *GROUP_MUTANTS])
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, make = (MUTANTS | GROUP_MUTANTS)[name]
    monkeypatch.setattr(owner, method, make(getattr(owner, method)))
    with pytest.raises(BaseException) as caught:  # whatever the machine says
        walk(NUM_WALKS, GroupsMachine if name in GROUP_MUTANTS else ContractMachine)
    assert not isinstance(caught.value, KeyboardInterrupt | pytest.fail.Exception), caught.value
    print(f"{name}: {type(caught.value).__name__}: {str(caught.value)[:100]}")
