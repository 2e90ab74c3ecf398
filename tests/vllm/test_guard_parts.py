"""The guard of connectors inside vLLM without an engine: both sides, step by step, around a scripted connector."""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import base as vllm_base
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from kvferry.errors import HostError
from kvferry.vllm.guard import MAX_STEPS
from kvferry.vllm.guarded import GuardedHooks

SIZE = 16
NUM_BLOCKS = 100


class Scripted:
    """Answers hooks by name from `answers`; an exception is raised."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self.answers: dict[str, Any] = {"request_finished": (False, None)}
        self.answers["get_num_new_matched_tokens"] = 2 * SIZE, True
        self.called: Counter[str] = Counter()
        self._connector_metadata: Any = None

    def __getattr__(self, hook: str) -> Any:
        if hook.startswith("_"):
            raise AttributeError(hook)
        return lambda *args, **kwargs: self.answer(hook)

    def answer(self, hook: str) -> Any:
        self.called[hook] += 1
        answer = self.answers.get(hook)
        if isinstance(answer, Exception):
            raise type(answer)(*answer.args)
        return answer


def scripted_hook(hook: str) -> Any:
    return lambda self, *args, **kwargs: self.answer(hook)


for _hook in [*vars(GuardedHooks), "get_kv_connector_stats"]:
    if not _hook.startswith("_") and _hook != "has_guard":
        setattr(Scripted, _hook, scripted_hook(_hook))


class Connector(GuardedHooks, Scripted):
    pass


class Pool:
    """Reference counts of blocks, as vLLM's BlockPool keeps them."""

    def __init__(self) -> None:
        self.blocks = [SimpleNamespace(block_id=i, ref_cnt=0) for i in range(NUM_BLOCKS)]

    def touch(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt -= 1

    def held(self) -> set[int]:
        return {block.block_id for block in self.blocks if block.ref_cnt}


class Rig:
    """A scheduler instance and its ranks; `step` is one step of vLLM."""

    def __init__(self, num_ranks: int = 1, num_groups: int = 1) -> None:
        spec = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=SIZE))
        cache = SimpleNamespace(kv_cache_groups=[spec] * num_groups, num_blocks=NUM_BLOCKS)
        config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=num_ranks))
        roles = vllm_base.KVConnectorRole
        self.workers = [Connector(config, roles.WORKER, cache) for _ in range(num_ranks)]
        self.scheduler = Connector(config, roles.SCHEDULER, cache)
        self.pool = Pool()
        self.scheduler.bind_gpu_block_pool(self.pool)
        self.scheduler.answers["build_connector_meta"] = "orders"
        for worker in self.workers:
            worker.answers |= {"has_connector_metadata": True, "get_block_ids_with_load_errors": set()}
            self.report(worker)
        self._aggregator = KVOutputAggregator(num_ranks)

    @staticmethod
    def report(worker: Connector, sent: set[str] = frozenset(), received: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        worker.answers["get_transfer_results"] = vllm_base.KVConnectorTransferResults(set(sent), set(received), set())

    def admit(self, request_id: str, is_async: bool = True, first_block: int = 1) -> Any:
        """A request of 3 blocks, 2 of which are to be loaded. Its claim is (2 * SIZE, is_async)."""
        self.scheduler.answers["get_num_new_matched_tokens"] = 2 * SIZE, is_async
        request = SimpleNamespace(request_id=request_id, num_tokens=3 * SIZE)
        self.scheduler.on_new_request(request)
        num, _ = self.scheduler.get_num_new_matched_tokens(request, 0)
        blocks = SimpleNamespace(get_block_ids=lambda: ([first_block, first_block + 1, first_block + 2],))
        self.scheduler.update_state_after_alloc(request, blocks, num)
        return request

    def step(self) -> KVConnectorOutput:
        envelope = self.scheduler.build_connector_meta(None)
        outputs = []
        for worker in self.workers:
            metadata = pickle.loads(pickle.dumps(envelope))  # as vLLM sends it to workers in other processes
            worker.handle_preemptions(metadata)
            worker.bind_connector_metadata(metadata)
            worker.start_load_kv(None)
            worker.wait_for_layer_load("layer")
            worker.save_kv_layer("layer", None, None)
            worker.wait_for_save()
            results = worker.get_transfer_results(set())
            output = KVConnectorOutput(
                finished_sending=results.finished_sending,
                finished_recving=results.finished_recving,
                failed_recving=results.failed_recving,
                invalid_block_ids=worker.get_block_ids_with_load_errors(),
                kv_connector_worker_meta=worker.build_connector_worker_meta(),
            )
            worker.clear_connector_metadata()
            if not isinstance(worker.answers["get_transfer_results"], Exception):
                self.report(worker)
            outputs.append(ModelRunnerOutput(req_ids=[], req_id_to_index={}, kv_connector_output=output))
        merged = self._aggregator.aggregate(outputs)
        assert merged is not None
        found = merged.kv_connector_output
        assert found is not None
        self.scheduler.update_connector_output(found)
        self.scheduler.take_events()
        return found


BOOM = RuntimeError("boom")
BEGIN = ["handle_preemptions", "bind_connector_metadata", "start_load_kv"]


@pytest.mark.parametrize("hook", ["update_state_after_alloc", "build_connector_meta"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_load_that_was_not_planned_has_failed_and_its_blocks_go_to_nobody(hook: str, num_ranks: int) -> None:
    rig = Rig(num_ranks)
    rig.scheduler.answers[hook] = BOOM
    request = rig.admit("r")
    output = rig.step()
    assert output.failed_recving == output.finished_recving == {"r"}
    assert rig.pool.held() == {1, 2}
    rig.scheduler.answers[hook] = "orders"
    assert rig.scheduler.get_num_new_matched_tokens(request, 0) == (0, False), "not again"
    for worker in rig.workers:  # it had been planned after all, and has ended
        rig.report(worker, received={"r"})
    output = rig.step()
    assert not output.finished_recving
    assert not output.failed_recving
    assert rig.pool.held() == set()


@pytest.mark.parametrize("hook", [*BEGIN, "get_transfer_results"])
def test_a_load_that_may_have_begun_on_one_rank_has_failed(hook: str) -> None:
    rig = Rig(2)
    rig.admit("r")
    good = rig.workers[1].answers[hook] if hook == "get_transfer_results" else None
    rig.workers[1].answers[hook] = BOOM
    assert not rig.step().finished_recving, "the other rank loads still"
    assert rig.pool.held() == {1, 2}
    rig.workers[1].answers[hook] = good
    rig.report(rig.workers[0], received={"r"})
    output = rig.step()
    assert output.failed_recving == output.finished_recving == {"r"}
    assert rig.pool.held() == {1, 2}
    rig.report(rig.workers[1], received={"r"})
    assert not rig.step().finished_recving
    assert rig.pool.held() == set()


@pytest.mark.parametrize("hook", [*BEGIN, "has_connector_metadata", "wait_for_layer_load", "wait_for_save",
                                  "get_transfer_results", "get_block_ids_with_load_errors"])  # fmt: skip
def test_all_blocks_of_a_synchronous_load_are_bad_after_it(hook: str) -> None:
    rig = Rig()
    rig.admit("r", is_async=False)
    rig.workers[0].answers[hook] = BOOM
    if hook == "has_connector_metadata":
        rig.workers[0].wait_for_layer_load = lambda _: rig.workers[0].has_connector_metadata()  # type: ignore[method-assign]
    assert rig.step().invalid_block_ids == {1, 2}
    assert rig.step().invalid_block_ids == set()


def test_failures_whose_blocks_are_lost_fail_every_load_under_way() -> None:
    rig = Rig()
    rig.admit("a")
    rig.admit("b", first_block=11)
    rig.step()
    rig.workers[0].answers["get_block_ids_with_load_errors"] = BOOM
    rig.report(rig.workers[0], received={"a"})
    output = rig.step()
    assert output.finished_recving == output.failed_recving == {"a"}
    rig.workers[0].answers["get_block_ids_with_load_errors"] = set()
    rig.report(rig.workers[0], received={"b"})
    output = rig.step()
    assert output.finished_recving == output.failed_recving == {"b"}
    assert rig.pool.held() == set()


def test_with_hybrid_caches_a_synchronous_load_that_fails_ends_the_engine() -> None:
    rig = Rig(num_groups=2)
    rig.admit("r", is_async=False)
    rig.workers[0].answers["start_load_kv"] = BOOM
    with pytest.raises(HostError, match="load_async"):
        rig.step()


@pytest.mark.parametrize("hook", ["build_connector_meta", "start_load_kv", "get_transfer_results"])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("shuts_down", [True, False])
def test_a_hook_that_fails_for_good_switches_all_sides_off(hook: str, num_ranks: int, shuts_down: bool) -> None:
    rig = Rig(num_ranks)
    rig.admit("loading")
    sent = rig.admit("sent", first_block=11)
    rig.step()
    rig.scheduler.answers["request_finished"] = True, {"lease": 1}
    assert rig.scheduler.request_finished(sent, [11]) == (True, {"lease": 1})
    broken = rig.scheduler if hook == "build_connector_meta" else rig.workers[-1]
    broken.answers[hook] = BOOM
    if not shuts_down:
        rig.workers[-1].answers["shutdown"] = BOOM
    received, failed, released = set(), set(), set()
    for _ in range(MAX_STEPS + 3):
        output = rig.step()
        received |= output.finished_recving or set()
        failed |= output.failed_recving
        released |= output.finished_sending or set()
    assert received == failed == {"loading", "sent"}
    assert released == ({"sent"} if shuts_down else set()), "a send that may still read its blocks holds them"
    assert rig.pool.held() == (set() if shuts_down else {1, 2, 11, 12})
    assert not rig.scheduler.has_pending_push_work()
    assert [c.called["shutdown"] for c in [rig.scheduler, *rig.workers]] == [1] * (num_ranks + 1)
    calls = rig.scheduler.called + rig.workers[0].called
    request = rig.admit("later", first_block=21)
    assert rig.step().is_empty() or num_ranks > 1
    assert rig.scheduler.request_finished(request, [21]) == (False, None)
    assert rig.scheduler.reset_cache() is None
    for connector in (rig.scheduler, *rig.workers):
        connector.shutdown()
    assert rig.scheduler.called + rig.workers[0].called == calls, "nothing is asked of it any more"


def test_one_that_could_not_be_told_of_a_failed_load_is_off_at_once() -> None:
    rig = Rig()
    rig.admit("r", is_async=False)
    rig.workers[0].answers["get_block_ids_with_load_errors"] = {2}
    rig.scheduler.answers["update_connector_output"] = BOOM
    assert rig.step().invalid_block_ids == {2}
    assert rig.scheduler.has_pending_push_work(), "until it is shut down"
    rig.workers[0].answers["get_block_ids_with_load_errors"] = set()
    rig.step()
    assert not rig.scheduler.has_pending_push_work()
    assert rig.scheduler.called["shutdown"] == rig.workers[0].called["shutdown"] == 1


def test_reports_that_would_end_vllm_are_left_out() -> None:
    rig = Rig()
    request = rig.admit("r", is_async=False)
    rig.report(rig.workers[0], sent={"r", "ghost"}, received={"r", "ghost"})
    output = rig.step()
    assert not output.finished_sending
    assert not output.finished_recving
    rig.scheduler.answers["request_finished"] = True, None
    rig.scheduler.request_finished(request, [1])
    assert rig.step().finished_sending == {"r"}, "it came early"
    rig.report(rig.workers[0], sent={"r"})
    assert not rig.step().finished_sending, "twice"


def test_blocks_set_aside_are_bounded() -> None:
    rig = Rig()
    rig.scheduler.answers["update_state_after_alloc"] = BOOM
    num_admitted = 0
    while rig.scheduler.get_num_new_matched_tokens(SimpleNamespace(request_id="probe", num_tokens=99), 0)[0]:
        rig.admit(f"r{num_admitted}", first_block=1 + 3 * num_admitted)
        num_admitted += 1
    assert len(rig.pool.held()) == 14, "the first count beyond an eighth of 100"
    rig.step()
    rig.step()
    assert rig.pool.held() == set()
