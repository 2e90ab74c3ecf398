"""MultiConnector: the ends of requests and connectors, and children that raise or answer wrongly."""

from __future__ import annotations

import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.multi_children import NO, Meta, Pair, child, finish, nested, request, results, start_load

from kvferry.contract import (
    ConnectorStats,
    KVConnectorOutput,
)
from kvferry.errors import ContractError
from kvferry.multi.child import MAX_ERRORS
from kvferry.multi.scheduler_side import ResetOutcome

# ---- ends ---------------------------------------------------------------------------------------------------------


def test_parameters_flat_and_by_child_without_touching_anyones_dict(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(children=[child(), child(cls="Plain"), nested(child())])
    a, b, c = {"host": "h", "port": 1}, {"port": 2, "id": "x"}, {"deep": True}
    inner: Any = pair.scheduler.children[2].connector.children[0].connector
    pair.s[0].answers["request_finished_all_groups"] = (False, a)
    pair.s[1].answers["request_finished"] = (True, b)
    inner.answers["request_finished_all_groups"] = (False, c)
    answer = pair.scheduler.request_finished_all_groups(request(), ([1, 2],))
    assert answer == (
        True,
        {
            "host": "h",
            "id": "x",
            "deep": True,
            "children": {
                "Hybrid": {"host": "h", "port": 1},
                "Plain": {"port": 2, "id": "x"},
                "MultiConnector": {"deep": True, "children": {"Hybrid": {"deep": True}}},
            },
        },
    )
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "port" in warning
    answer[1]["children"]["Hybrid"]["host"] = "other"
    assert (a, b, c) == ({"host": "h", "port": 1}, {"port": 2, "id": "x"}, {"deep": True})
    assert [args[1] for args in pair.s[1].called("request_finished")] == [[1, 2]], "one group: the flat list"


def test_both_forms_of_finishing_are_one() -> None:
    pair = Pair()
    pair.scheduler.request_finished(request("x"), [1])
    pair.scheduler.request_finished_all_groups(request("y"), ([1],))
    assert [args[1] for args in pair.s[0].called("request_finished_all_groups")] == [([1],), ([1],)]


def test_several_groups_reaching_a_child_of_one_are_never_dropped() -> None:
    pair = Pair(children=[child(), child(cls="Plain")])
    with pytest.raises(ContractError, match="Plain supports one KV cache group, the host passed 2"):
        pair.scheduler.request_finished_all_groups(request(), ([1], [2]))
    assert not pair.s[0].called("request_finished_all_groups"), "none is asked: nothing is half done"


@pytest.mark.parametrize("answer", [RuntimeError("boom"), True, (1, None), (True, [])])
def test_a_bad_end_of_one_child_is_no_promise(answer: Any) -> None:
    pair = Pair()
    pair.s[0].answers["request_finished_all_groups"] = answer
    pair.s[1].answers["request_finished_all_groups"] = (False, {"k": 1})
    assert pair.scheduler.request_finished(request(), [1]) == (False, {"k": 1, "children": {"Hybrid#2": {"k": 1}}})


@pytest.mark.parametrize(
    ("answers", "outcomes", "is_done"),
    [
        ((True, True), ("done", "done"), True),
        ((True, None), ("done", "not implemented"), False),
        ((False, True), ("failed", "done"), False),
        ((RuntimeError("x"), True), ("failed", "done"), False),
        ((NotImplementedError(), False), ("not implemented", "failed"), False),
    ],
)
def test_reset_gives_a_receipt_per_child(answers: Any, outcomes: Any, is_done: bool) -> None:
    pair = Pair()
    for connector, answer in zip(pair.s, answers, strict=True):
        connector.answers["reset_cache"] = answer
    assert pair.scheduler.reset_cache() is is_done
    labels = ("Hybrid", "Hybrid#2")
    assert pair.scheduler.last_reset == dict(zip(labels, map(ResetOutcome, outcomes), strict=True))


def test_shutdown_reaches_all_and_raises_the_last_error() -> None:
    pair = Pair(3)
    for connector in pair.w[:2]:
        connector.answers["shutdown"] = RuntimeError(connector.name)
    with pytest.raises(RuntimeError, match=r"^b$"):
        pair.worker.shutdown()
    assert all(connector.called("shutdown") for connector in pair.w)
    pair.scheduler.shutdown()


# ---- a child that breaks ------------------------------------------------------------------------------------------


def test_pending_questions_are_any() -> None:
    pair = Pair()
    pair.s[0].answers |= {"has_pending_push_work": RuntimeError(), "has_pending_block_frees": False}
    assert not pair.scheduler.has_pending_push_work()
    pair.s[1].answers |= {"has_pending_push_work": True, "has_pending_block_frees": True}
    assert pair.scheduler.has_pending_push_work()
    assert pair.scheduler.has_pending_block_frees()


def test_a_step_binds_each_childs_own_orders() -> None:
    pair = Pair()
    assert not pair.worker.has_connector_metadata()
    meta = pair.scheduler.build_connector_meta("output")
    pair.worker.handle_preemptions(meta)
    pair.worker.bind_connector_metadata(meta)
    assert pair.worker.has_connector_metadata()
    pair.worker.start_load_kv("context", num_tokens=3)
    pair.worker.wait_for_layer_load("layer0")
    pair.worker.save_kv_layer("layer0", torch.zeros(1), None, more=1)
    pair.worker.finish_forward()
    pair.worker.wait_for_save()
    pair.worker.clear_connector_metadata()
    assert not pair.worker.has_connector_metadata()
    for connector in pair.w:
        assert [
            args for name, args in connector.calls if name in ("handle_preemptions", "bind_connector_metadata")
        ] == [(Meta(connector.name),)] * 2
        assert [name for name, _ in connector.calls[2:]] == [
            "start_load_kv", "wait_for_layer_load", "save_kv_layer", "finish_forward", "wait_for_save",
            "clear_connector_metadata",
        ]  # fmt: skip
    with pytest.raises(ContractError, match="Meta"):
        pair.worker.bind_connector_metadata(Meta("foreign"))


LOAD_HOOKS = ["handle_preemptions", "bind_connector_metadata", "start_load_kv", "wait_for_layer_load"]
REPORT_HOOKS = ["get_transfer_results", "get_block_ids_with_load_errors"]


def layered_step(pair: Pair) -> Counter[str]:
    """A step in which a host goes on after errors, as the embedded engine does; hooks that raised."""
    raised: Counter[str] = Counter()

    def call(hook: str, *args: Any) -> Any:
        try:
            return getattr(pair.worker, hook)(*args)
        except Exception:
            raised[hook] += 1

    meta = pair.scheduler.build_connector_meta(object())
    for hook, args in [
        ("handle_preemptions", (meta,)),
        ("bind_connector_metadata", (meta,)),
        ("start_load_kv", (None,)),
        *[("wait_for_layer_load", (f"layer{i}",)) for i in range(9)],
        *[("save_kv_layer", (f"layer{i}", torch.zeros(1), None)) for i in range(9)],
        ("wait_for_save", ()),
        ("get_transfer_results", (set(),)),
        ("get_block_ids_with_load_errors", ()),
    ]:
        call(hook, *args)
    output = KVConnectorOutput(kv_connector_worker_meta=call("build_connector_worker_meta"))
    call("clear_connector_metadata")
    pair.scheduler.update_connector_output(output)
    return raised


@pytest.mark.parametrize("hook", LOAD_HOOKS + REPORT_HOOKS)
@pytest.mark.parametrize("is_async", [False, True])
def test_an_exception_while_loading_reaches_the_host_and_all_others_are_called(hook: str, is_async: bool) -> None:
    pair = Pair(3)
    start_load(pair, 1, is_async=is_async)
    pair.w[1].answers[hook] = RuntimeError("boom")
    assert layered_step(pair)[hook] == 1
    for connector in (pair.w[0], pair.w[2]):
        assert len(connector.called("wait_for_layer_load")) == len(connector.called("save_kv_layer")) == 9
        assert connector.called(hook)
        (output,) = pair.s[0].called("update_connector_output")[-1]
        assert output.invalid_block_ids == (set() if is_async else {11, 12}), "its blocks were never proved"


@pytest.mark.parametrize("hook", [*LOAD_HOOKS, *REPORT_HOOKS, "save_kv_layer", "wait_for_save"])
def test_an_exception_of_a_child_that_loads_nothing_is_its_own(hook: str) -> None:
    pair = Pair()
    start_load(pair, 0, is_async=False)
    pair.w[1].answers[hook] = RuntimeError("boom")
    assert not layered_step(pair)
    assert len(pair.w[1].called(hook)) == 1, "one layer is enough to know"
    stats = pair.scheduler.get_kv_connector_stats()
    assert stats is not None
    assert stats.children == {"Hybrid#2": ConnectorStats(fallbacks={"hook raised": 1})}


def test_a_save_that_raises_beside_a_synchronous_load_fails_that_load() -> None:
    """It may have been about to say what was not loaded."""
    pair = Pair()
    start_load(pair, 1, is_async=False)
    pair.w[1].answers["wait_for_save"] = RuntimeError("boom")
    assert layered_step(pair)["wait_for_save"] == 1
    assert pair.w[0].called("wait_for_save")
    (output,) = pair.s[0].called("update_connector_output")[-1]
    assert output.invalid_block_ids == {11, 12}


def test_a_child_that_could_not_be_told_of_a_failed_load_is_off_at_once() -> None:
    pair = Pair()
    pair.s[1].answers["update_connector_output"] = RuntimeError("boom")
    pair.scheduler.update_connector_output(KVConnectorOutput())
    assert not pair.scheduler.children[1].is_off, "there was nothing to be told"
    pair.scheduler.update_connector_output(KVConnectorOutput(invalid_block_ids={3}))
    assert [child.is_off for child in pair.scheduler.children] == [False, True]


def test_results_survive_another_childs_exception() -> None:
    pair = Pair()
    pair.scheduler.on_new_request(request("s"))
    finish(pair, True, False, name="s")
    start_load(pair, 1)
    pair.w[0].answers["get_transfer_results"] = results(sent="s")
    pair.w[1].answers["get_transfer_results"] = RuntimeError("boom")
    assert layered_step(pair)["get_transfer_results"] == 1
    pair.w[0].answers.clear()
    pair.w[1].answers.clear()
    assert pair.worker.get_transfer_results(set()).finished_sending == {"s"}


def test_lost_orders_of_a_synchronous_load_are_an_error_in_the_step() -> None:
    pair = Pair()
    start_load(pair, 0, is_async=False)
    pair.s[0].answers["build_connector_meta"] = RuntimeError("boom")
    assert layered_step(pair)["start_load_kv"] == 1
    assert pair.w[1].called("start_load_kv"), "the other child works on"
    assert not pair.w[0].called("bind_connector_metadata")


def test_a_child_that_keeps_raising_on_the_scheduler_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair()
    pair.scheduler.on_new_request(request("s"))
    finish(pair, True, True, name="s")
    pair.s[0].answers["get_num_new_matched_tokens"] = RuntimeError("boom")
    pair.s[1].answers["get_num_new_matched_tokens"] = (8, True)
    for _ in range(MAX_ERRORS + 3):
        assert pair.match(request()) == (8, True)
    assert len(pair.s[0].called("get_num_new_matched_tokens")) == MAX_ERRORS
    assert "Hybrid is switched off" in caplog.text
    pair.s[0].calls.clear()
    for connector in pair.w:
        connector.answers["get_transfer_results"] = results(sent="s")
    assert pair.step().finished_sending == {"s"}, "what it had under way is over"
    assert [name for name, _ in pair.s[0].calls] == ["update_connector_output", "shutdown"], "no orders any more"
    worker_hooks = [name for name, _ in pair.w[0].calls]
    assert not {"bind_connector_metadata", "start_load_kv", "wait_for_save"} & set(worker_hooks)
    stats = pair.scheduler.get_kv_connector_stats()
    assert stats is not None
    assert stats.children["Hybrid"].fallbacks == {"hook raised": MAX_ERRORS, "switched off": 1}


def test_a_child_that_keeps_raising_on_the_worker_claims_nothing_any_more() -> None:
    pair = Pair()
    pair.w[0].answers["wait_for_save"] = RuntimeError("boom")
    for _ in range(MAX_ERRORS):
        pair.step()
    pair.claims((8, True), NO)
    assert pair.match(request()) == NO
    stats = pair.scheduler.get_kv_connector_stats()
    assert stats is not None
    assert stats.children["Hybrid"].fallbacks == {"hook raised": MAX_ERRORS, "switched off": 1}


@pytest.mark.parametrize("is_async", [True, False])
def test_a_load_planned_while_its_child_was_switched_off_fails_at_once(is_async: bool) -> None:
    pair = Pair()
    start_load(pair, 0, is_async=is_async)
    pair.worker.children[0].switch_off("test")
    if is_async:
        output = pair.step()
        assert (output.finished_recving, output.failed_recving) == ({"r"}, {"r"})
    else:
        assert layered_step(pair)["start_load_kv"] == 1
    assert not pair.w[0].called("start_load_kv")


def test_a_switched_off_child_never_holds_up_the_others_reports() -> None:
    pair = Pair()
    start_load(pair, 0)
    pair.w[0].answers["get_transfer_results"] = RuntimeError("boom")
    raised = sum((layered_step(pair) for _ in range(MAX_ERRORS + 2)), Counter())
    assert raised == {"get_transfer_results": MAX_ERRORS - 1}
    pair.scheduler.on_new_request(request("s"))
    finish(pair, False, True, name="s")
    pair.w[1].answers["get_transfer_results"] = results(sent="s")
    assert pair.step().finished_sending == {"s"}


def test_nested_pairs_count_completions_through_both_levels() -> None:
    pair = Pair(children=[child(), nested(child(), child())])
    inner_s: Any = [c.connector for c in pair.scheduler.children[1].connector.children]
    inner_w: Any = [c.connector for c in pair.worker.children[1].connector.children]
    pair.scheduler.on_new_request(request())
    for connector in (pair.s[0], *inner_s):
        connector.answers["request_finished_all_groups"] = (True, None)
    assert pair.scheduler.request_finished(request(), [1]) == (True, None)
    forwarded = []
    for connector in (inner_w[1], pair.w[0], inner_w[0]):
        connector.answers["get_transfer_results"] = results(sent="r")
        forwarded.append(pair.step().finished_sending)
    assert forwarded == [set(), set(), {"r"}]
    assert [c.called("update_connector_output")[-1][0].finished_sending for c in inner_s] == [{"r"}, set()]


class Pool:
    """Counts who holds what."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [SimpleNamespace(block_id=i) for i in range(num_blocks)]
        self.refs = [0] * num_blocks

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            self.refs[block.block_id] += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            self.refs[block.block_id] -= 1


@pytest.mark.parametrize("closes", [True, False])
def test_what_a_switched_off_child_had_under_way_is_over_once_it_is_shut_down(closes: bool) -> None:
    pair, pool = Pair(), Pool(4)
    pair.scheduler.bind_gpu_block_pool(pool)
    for child_side, blocks in zip(pair.s, (pool.blocks[1:3], pool.blocks[2:4]), strict=True):
        child_side.called("bind_gpu_block_pool")[0][0].touch(blocks)
    pair.s[0].called("bind_gpu_block_pool")[0][0].free_blocks(pool.blocks[1:2])
    pair.scheduler.on_new_request(request("s"))
    start_load(pair, 0)
    finish(pair, True, False, name="s")
    pair.step()
    if not closes:
        pair.w[0].answers["shutdown"] = RuntimeError("stuck")
    pair.scheduler.children[0].switch_off("test")
    assert pair.scheduler.has_pending_push_work(), "its end takes a step"
    output = pair.step()
    if closes:
        assert output.finished_sending == {"s"}
        assert (output.finished_recving, output.failed_recving) == ({"r"}, {"r"})
        assert pool.refs == [0, 0, 1, 1], "the other child keeps its pins"
        assert not pair.scheduler.has_pending_push_work()
    else:
        assert not output.finished_sending | output.finished_recving, "it may still read and write"
        assert pool.refs == [0, 0, 2, 1]
    pair.scheduler.shutdown()
    pair.w[0].answers.clear()
    pair.worker.shutdown()
    for side in (pair.s[0], pair.w[0]):
        assert len(side.called("shutdown")) == (1 if closes else 2 if side is pair.w[0] else 1)
