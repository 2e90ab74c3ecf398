"""MultiConnector: which claim is taken, who loads, which completions count, and what each child hears of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.multi_children import (
    LOOKING,
    NO,
    Pair,
    Report,
    blocks,
    cache_config,
    child,
    finish,
    nested,
    request,
    results,
    start_load,
)

from kvferry.contract import (
    CacheHitSource,
    ConnectorStats,
    KVConnectorOutput,
    KVConnectorRole,
    KVConnectorTransferResults,
    LoadFailure,
    PrefixRange,
)
from kvferry.errors import ContractError
from kvferry.multi.connector import MultiConnector
from kvferry.multi.messages import SourcedEvent

# ---- which claim is taken -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "answers", "answer"),
    [
        ("first", [NO, (8, True), (16, False)], (8, True)),
        ("longest", [(4, True), (8, True), (16, False)], (16, False)),
        ("longest", [(4, True), (16, True), (16, False)], (16, True)),
        ("first", [NO, NO, NO], NO),
        ("first", [LOOKING, NO, NO], LOOKING),
        ("first", [LOOKING, (8, True), NO], LOOKING),
        ("first", [(8, True), LOOKING, LOOKING], (8, True)),
        ("longest", [(8, True), LOOKING, NO], LOOKING),
        # answers that break the contract are none
        ("first", [(-5, False), (8, True), NO], (8, True)),
        ("first", [(0, True), (8, True), NO], (8, True)),
        ("first", [(101, True), (8, True), NO], (8, True)),
        ("first", [(100, False), (8, True), NO], (8, True)),
        ("longest", [(1000, True), (8, True), NO], (8, True)),
        ("first", ["8", (8, True), NO], (8, True)),
        ("first", [(8.0, True), None, NO], NO),
        ("first", [RuntimeError("boom"), (8, True), NO], (8, True)),
    ],
)
def test_load_policy(policy: str, answers: Any, answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(3, load_policy=policy)
    pair.claims(*answers)
    assert pair.match(request()) == answer
    assert all(connector.called("get_num_new_matched_tokens") for connector in pair.s), "all are asked"


def test_a_bad_claim_is_logged_with_the_childs_label_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    pair = Pair(children=[child("a"), child("b")])
    pair.claims(NO, (-5, False))
    assert pair.match(request()) == NO
    assert "Hybrid#2" in caplog.text
    assert "must not be negative" in caplog.text
    stats = pair.scheduler.get_kv_connector_stats()
    assert stats is not None
    assert stats.children["Hybrid#2"].fallbacks == {"answer broke the contract": 1}


@pytest.mark.parametrize("policy", ["first", "longest"])
def test_looking_delays_anothers_hit_by_the_deadline_at_most(policy: str) -> None:
    pair = Pair(load_policy=policy, lookup_wait_s=2)
    pair.claims(LOOKING, NO)
    assert pair.match(request()) == LOOKING
    pair.clock.advance(10)
    assert pair.match(request()) == LOOKING, "with no hit at hand nothing is lost by waiting"
    pair.claims(LOOKING, (8, True))
    assert pair.match(request()) == LOOKING
    pair.clock.advance(1.9)
    assert pair.match(request()) == LOOKING
    assert pair.match(request("other")) == LOOKING
    pair.clock.advance(0.1)
    assert pair.match(request()) == (8, True)
    assert pair.match(request("other")) == LOOKING, "each request has its own time"
    pair.claims((4, True), (8, True))
    assert pair.match(request("other")) == ((4, True) if policy == "first" else (8, True))


def test_the_deadline_starts_anew_after_an_admission() -> None:
    pair = Pair(lookup_wait_s=2)
    pair.claims(LOOKING, (8, True))
    pair.match(request())
    pair.clock.advance(2)
    assert pair.match(request()) == (8, True)
    pair.scheduler.update_state_after_alloc(request(), blocks(1, 2), 8)
    assert pair.match(request()) == LOOKING
    pair.clock.advance(2)
    assert pair.match(request()) == (8, True)


# ---- the load owner -----------------------------------------------------------------------------------------------


def test_the_owner_gets_the_tokens_and_speaks_for_the_load() -> None:
    pair = Pair(3)
    pair.claims(NO, (8, True), (16, True))
    pair.s[1].answers |= {
        "get_loaded_kv_cache_group_ids": (7,),
        "get_external_cache_hit_sources": {CacheHitSource.DISK: 8},
    }
    req, allocated = request(), blocks(1, 2)
    assert pair.match(req) == (8, True)
    assert pair.scheduler.get_loaded_kv_cache_group_ids(req) == (7,)
    pair.scheduler.update_state_after_alloc(req, allocated, 8)
    assert [c.called("update_state_after_alloc")[0][1:] for c in pair.s] == [
        (allocated, 0), (allocated, 8), (allocated, 0)
    ]  # fmt: skip
    assert pair.scheduler.get_external_cache_hit_sources(req, 8) == {CacheHitSource.DISK: 8}
    pair.s[1].answers["get_external_cache_hit_sources"] = {CacheHitSource.DISK: 9}
    assert pair.scheduler.get_external_cache_hit_sources(req, 8) == {CacheHitSource.EXTERNAL_UNSPECIFIED: 8}
    pair.scheduler.update_state_after_alloc(req, allocated, 0)
    assert [c.called("update_state_after_alloc")[1][2] for c in pair.s] == [0, 0, 0]


def test_a_later_miss_or_the_end_clears_the_owner() -> None:
    pair = Pair()
    for clear in (
        lambda: (pair.claims(NO, NO), pair.match(request())),
        lambda: pair.scheduler.request_finished(request(), [1]),
    ):
        pair.claims(NO, (8, True))
        pair.match(request())
        clear()
        assert pair.scheduler.get_loaded_kv_cache_group_ids(request()) == (0,)
        with pytest.raises(ContractError, match="no child claims"):
            pair.scheduler.update_state_after_alloc(request(), blocks(1), 4)
        assert len(pair.scheduler._claims) == 0


def test_the_owners_exception_reaches_the_host_after_all_were_told() -> None:
    pair = Pair(3)
    pair.claims((8, True), NO, NO)
    pair.match(request())
    for connector in pair.s:
        connector.answers["update_state_after_alloc"] = RuntimeError(connector.name)
    with pytest.raises(RuntimeError, match=r"^a$"):
        pair.scheduler.update_state_after_alloc(request(), blocks(1, 2), 8)
    assert all(connector.called("update_state_after_alloc") for connector in pair.s)
    pair.s[0].answers.clear()
    pair.claims((8, True), NO, NO)
    pair.match(request())
    pair.scheduler.update_state_after_alloc(request(), blocks(1, 2), 8)  # others' faults stay here


# ---- completions --------------------------------------------------------------------------------------------------


def test_one_saver_of_two() -> None:
    pair = Pair()
    pair.scheduler.on_new_request(request())
    assert finish(pair, True, False) == (True, None)
    pair.w[1].answers["get_transfer_results"] = results(sent="r")
    assert pair.step().finished_sending == set(), "the other child promised nothing"
    pair.w[0].answers["get_transfer_results"] = results(sent="r")
    assert pair.step().finished_sending == {"r"}
    assert pair.step().finished_sending == set(), "once"


@given(data=st.data(), num=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_k_savers_are_counted_exactly(data: st.DataObject, num: int) -> None:
    """Reports in any order, early or late, repeated, also of children that promised nothing: one completion."""
    pair = Pair(num)
    promised = data.draw(st.sets(st.integers(0, num - 1)))
    needed = [(data.draw(st.integers(0, 6)), index) for index in sorted(promised)]
    noise = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, num - 1)), max_size=8))
    finish_step = data.draw(st.integers(0, 4))
    reports = {*needed, *noise}
    pair.scheduler.on_new_request(request())
    forwarded: list[int] = []
    for step in range(10):
        if step == finish_step:
            assert finish(pair, *(i in promised for i in range(num)))[0] is bool(promised)
        for i, connector in enumerate(pair.w):
            connector.answers["get_transfer_results"] = results(sent="r" if (step, i) in reports else "")
        output = pair.step()
        forwarded += [step] * len(output.finished_sending or ())
    first = [min(step for step, index in reports if index == i) for i in promised]
    assert forwarded == ([max(*first, finish_step, 0)] if promised else [])


def test_partial_tails_count_with_the_other_promises() -> None:
    pair = Pair(3)
    pair.scheduler.on_new_request(request())
    for connector in pair.s[:2]:
        connector.answers["register_finished_partial_tail"] = True
    assert pair.scheduler.register_finished_partial_tail(request(), None, None) is True
    assert finish(pair, True, False, True) == (True, None)
    forwarded = []
    for index in (0, 2, 1):
        pair.w[index].answers["get_transfer_results"] = results(sent="r")
        forwarded.append(pair.step().finished_sending)
    assert forwarded == [set(), set(), {"r"}]


def test_a_reused_id_is_counted_anew() -> None:
    pair = Pair()
    for _ in range(2):
        pair.scheduler.on_new_request(request())
        pair.step()
        finish(pair, True, True)
        pair.step()
        pair.w[0].answers["get_transfer_results"] = results(sent="r")
        assert pair.step().finished_sending == set()
        pair.w[1].answers["get_transfer_results"] = results(sent="r")
        assert pair.step().finished_sending == {"r"}
        assert pair.step().finished_sending == set()
        for connector in pair.w:
            connector.answers.clear()
        pair.step()


def test_a_load_is_forwarded_once_and_only_from_its_owner() -> None:
    pair = Pair()
    start_load(pair, 1)
    pair.w[0].answers["get_transfer_results"] = results(received="rx", failed="r")
    output = pair.step()
    assert (output.finished_recving, output.failed_recving) == (set(), set())
    pair.w[1].answers["get_transfer_results"] = results(received="r")
    output = pair.step()
    assert (output.finished_recving, output.failed_recving) == ({"r"}, set())
    assert pair.step().finished_recving == set(), "a duplicate"
    start_load(pair, 0)
    output = pair.step()
    assert (output.finished_recving, output.failed_recving) == ({"r"}, {"r"}), "another load of that request"


def test_a_failure_told_before_the_end_is_remembered() -> None:
    pair = Pair()
    start_load(pair, 0)
    pair.w[0].answers["get_transfer_results"] = results(failed="r")
    assert pair.step().failed_recving == set()
    pair.w[0].answers["get_transfer_results"] = results(received="r")
    output = pair.step()
    assert (output.finished_recving, output.failed_recving) == ({"r"}, {"r"})


def test_failed_blocks_are_joined() -> None:
    pair = Pair()
    failures = [LoadFailure("r", 0, i) for i in range(2)]
    for i, connector in enumerate(pair.w):
        connector.answers["get_transfer_results"] = KVConnectorTransferResults(failed_blocks={failures[i]})
        connector.answers["get_block_ids_with_load_errors"] = {i + 3}
    assert pair.worker.get_transfer_results(set()).failed_blocks == set(failures)
    assert pair.worker.get_transfer_results(set()).failed_blocks == set(failures)
    assert pair.worker.get_block_ids_with_load_errors() == {3, 4}
    assert pair.worker.get_finished({"x"}) == (None, None)
    assert pair.w[1].called("get_transfer_results")[-1] == ({"x"},)


# ---- each child's own view of the reports -------------------------------------------------------------------------


def test_each_child_hears_of_its_own_reports_only() -> None:
    pair = Pair()
    pair.scheduler.on_new_request(request("s"))
    finish(pair, True, True, name="s")
    start_load(pair, 1)
    stats, event = ConnectorStats(held_blocks=3), object()
    pair.w[0].answers |= {
        "get_transfer_results": results(sent="s", received="r"),
        "get_kv_connector_stats": stats,
        "build_connector_worker_meta": Report(["a"]),
        "get_block_ids_with_load_errors": {4},
    }
    pair.w[1].answers |= {
        "get_transfer_results": results(received="r"),
        "get_kv_connector_kv_cache_events": event,
    }
    output = pair.step()
    assert output.finished_sending == set()
    a, b = (connector.called("update_connector_output")[0][0] for connector in pair.s)
    assert (a.finished_sending, a.finished_recving, a.kv_connector_stats) == ({"s"}, set(), stats)
    assert (a.kv_connector_worker_meta, a.kv_cache_events) == (Report(["a"]), None)
    assert (b.finished_sending, b.finished_recving, b.kv_connector_stats) == (set(), {"r"}, None)
    assert b.kv_connector_worker_meta is None
    assert type(b.kv_cache_events) is object
    assert a.invalid_block_ids == b.invalid_block_ids == {4}, "bad blocks concern everyone who may have read them"


def test_worker_reports_of_several_ranks_are_merged_by_child() -> None:
    pair = Pair(tp=2)
    other = MultiConnector(pair.worker._vllm_config, KVConnectorRole.WORKER, cache_config())
    start_load(pair, 0)
    meta = pair.scheduler.build_connector_meta(object())
    rank1: Any = other.children[0].connector
    pair.w[0].answers |= {"build_connector_worker_meta": Report(["rank0"]), "get_transfer_results": results("", "r")}
    rank1.answers |= {
        "build_connector_worker_meta": Report(["rank1"]),
        "get_transfer_results": results("", "r", "r"),
        "get_kv_connector_kv_cache_events": [1, 2],
    }
    seen = []
    for ranks in ([pair.worker], [other]):
        reports = []
        for worker in ranks:
            worker.bind_connector_metadata(meta)
            worker.get_transfer_results(set())
            worker.get_kv_connector_kv_cache_events()
            reports.append(worker.build_connector_worker_meta())
        pair.scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=reports[0]))
        seen.append(pair.s[0].called("update_connector_output")[-1][0])
    assert [out.finished_recving for out in seen] == [set(), {"r"}], "complete when both ranks have reported"
    assert [out.failed_recving for out in seen] == [set(), {"r"}]
    pair.worker._events[0], other._events[0] = [[1]], [[2, 3]]
    merged = pair.worker.build_connector_worker_meta().aggregate(other.build_connector_worker_meta())
    pair.scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=merged))
    out = pair.s[0].called("update_connector_output")[-1][0]
    assert out.kv_connector_worker_meta == Report(["rank0", "rank1"])
    assert out.kv_cache_events == [1, 2, 3]
    with pytest.raises(ContractError, match="same children"):
        merged.aggregate(Report([]))


def test_two_ranks_that_report_in_one_step_are_counted_as_two() -> None:
    pair = Pair(tp=2)
    start_load(pair, 0)
    meta = pair.scheduler.build_connector_meta(object())
    reports: list[Any] = []
    for _ in range(2):
        worker = MultiConnector(pair.worker._vllm_config, KVConnectorRole.WORKER, cache_config())
        rank: Any = worker.children[0].connector
        rank.answers["get_transfer_results"] = results(received="r")
        worker.bind_connector_metadata(meta)
        worker.get_transfer_results(set())
        reports.append(worker.build_connector_worker_meta())
    pair.scheduler.update_connector_output(KVConnectorOutput(kv_connector_worker_meta=reports[0].aggregate(reports[1])))
    assert pair.s[0].called("update_connector_output")[0][0].finished_recving == {"r"}


def test_a_look_after_a_hit_leaves_no_owner() -> None:
    pair = Pair()
    pair.claims((8, True), NO)
    pair.match(request())
    pair.claims(LOOKING, (8, True))
    assert pair.match(request()) == LOOKING
    with pytest.raises(ContractError, match="no child claims"):
        pair.scheduler.update_state_after_alloc(request(), blocks(1), 4)


def test_statistics_by_child_and_strangers_left_out() -> None:
    pair = Pair(children=[child(), nested(child(), child()), child()])
    assert pair.worker.get_kv_connector_stats() is None
    inner: Any = pair.worker.children[1].connector
    deep, own = ConnectorStats(held_blocks=1), ConnectorStats(held_blocks=2)
    inner.children[1].connector.answers["get_kv_connector_stats"] = deep
    pair.w[0].answers["get_kv_connector_stats"] = own
    pair.w[2].answers["get_kv_connector_stats"] = {"a": 1}
    assert pair.worker.get_kv_connector_stats() == ConnectorStats(
        children={"Hybrid": own, "MultiConnector": ConnectorStats(children={"Hybrid#2": deep})}
    )


@dataclass(frozen=True)
class Stored:
    block: int
    source: str = ""


def test_events_are_joined_with_their_source() -> None:
    pair = Pair(children=[child(), nested(child())])
    inner: Any = pair.scheduler.children[1].connector.children[0].connector
    pair.s[0].answers["take_events"] = lambda: (Stored(i) for i in range(2))
    inner.answers["take_events"] = [Stored(9), "text"]
    assert list(pair.scheduler.take_events()) == [
        Stored(0, "Hybrid"),
        Stored(1, "Hybrid"),
        Stored(9, "MultiConnector/Hybrid"),
        SourcedEvent("MultiConnector/Hybrid", "text"),
    ]
    pair.w[0].answers["get_kv_connector_kv_cache_events"] = lambda: iter([Stored(4)])
    assert pair.worker.get_kv_connector_kv_cache_events() == [Stored(4, "Hybrid")]
    pair.w[0].answers.clear()
    assert pair.worker.get_kv_connector_kv_cache_events() is None


def test_explanations_name_their_child() -> None:
    pair = Pair(children=[child(), nested(child())])
    inner: Any = pair.scheduler.children[1].connector.children[0].connector
    found = PrefixRange(0, 16, "host", "stored")
    pair.s[0].answers["explain_prefix"] = [found]
    inner.answers["explain_prefix"] = [found]
    assert pair.scheduler.explain_prefix(request(), 0) == [
        replace(found, source="Hybrid", is_claimed=False),
        replace(found, source="MultiConnector/Hybrid", is_claimed=False),
    ]
