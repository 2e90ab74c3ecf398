"""A random walk through the contract: the embedded engine over the stub model, a MultiConnector of two faulty children.

`ContractMachine` walks with one KV group, `GroupsMachine` with three, two of which have windows.

Rules admit requests, step the engine, break lookups, loads, saves and hooks, abort, reset and let time pass. After each
step every block must have exactly the owners the books say, no block with a transfer under way may be free or (for
loads) anybody else's, every token must be the one the stub model's definition gives, and nobody may wait past the
deadlines. At the end all faults are lifted: everything must finish, and every block come back.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvferry import LLM, SamplingParams
from kvferry.clock import FakeClock
from kvferry.engine.layout_choice import LAYOUTS
from kvferry.engine.outputs import RequestOutput
from kvferry.testing.faulty import LoadFault, Medium, forget_media, media
from kvferry.testing.stub_model import StubModel

BLOCK_SIZE = 4
CHILDREN = ("a", "b")
STUCK_AFTER_S = 60 + 300 + 300 + 100  # lookup, load and stall deadlines one after the other, and some
BAD_ANSWERS: list[Any] = [
    (10_000, False), (10_000, True), (-4, False), (0, True), ("many", False), (True, False), None, 7,
]  # fmt: skip
LOAD_FAULTS = [fault for fault in LoadFault if fault is not LoadFault.NONE]
RAISING_HOOKS = ("on_new_request", "wait_for_layer_load", "wait_for_save", "request_finished", "get_transfer_results")
DOCUMENTS = [[(37 * d + 11 * i) % 500 for i in range(40)] for d in range(3)]

fired: Counter[str] = Counter()
"""How often each rule ran, and what came of them, over all walks."""


def engine(
    model: StubModel,
    num_blocks: int,
    policy: str,
    is_async: tuple[bool, bool],
    sends: tuple[bool, bool],
    load_policy: str,
    prefix_caching: bool,
    **place: Any,
) -> LLM:
    """The engine under test; `place` is its model runner, kernel blocks and layout."""
    children = [
        {
            "kv_connector": "FaultyConnector",
            "kv_connector_module_path": "kvferry.testing.faulty",
            "kv_connector_extra_config": {"medium": name, "load_async": load, "send_on_finish": send},
        }
        for name, load, send in zip(CHILDREN, is_async, sends, strict=True)
    ]
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"connectors": children, "load_policy": load_policy},
    }
    return LLM(
        model,
        kv_transfer_config=transfer,
        clock=FakeClock(),
        num_kv_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=16,
        max_num_seqs=4,
        enable_prefix_caching=prefix_caching,
        **place,
    )


@functools.cache
def expected_tokens(model: StubModel, prompt: tuple[int, ...]) -> list[int]:
    """The longest completion that rules ask for, from the model's definition."""
    return model.expected_tokens(prompt, 12)


@functools.cache
def expected_page(model: StubModel, group: int, tokens: tuple[int, ...]) -> bytes:
    """The KV of the last block of these tokens in the only layer of a group, from the model's definition."""
    return model.expected_kv(tokens, group)[-BLOCK_SIZE * model.token_bytes :]


class ContractMachine(RuleBasedStateMachine):
    """One walk."""

    model = StubModel(num_layers=1)
    num_blocks = 25

    @initialize(
        policy=st.sampled_from(["recompute", "recompute", "fail"]),
        is_async=st.tuples(st.booleans(), st.booleans()),
        sends=st.tuples(st.booleans(), st.booleans()),
        load_policy=st.sampled_from(["first", "longest"]),
        prefix_caching=st.sampled_from([True, True, False]),
        runner=st.sampled_from(["V1", "V1", "V2", "V2 with kernel blocks"]),
        layout=st.sampled_from(LAYOUTS),
    )
    def start(
        self,
        policy: str,
        is_async: tuple[bool, bool],
        sends: tuple[bool, bool],
        load_policy: str,
        prefix_caching: bool,
        runner: str,
        layout: str,
    ) -> None:
        torch.set_num_threads(1)
        fired[f"walk: {runner}"] += 1
        place = {"use_v2_model_runner": runner != "V1", "kv_cache_layout": layout}
        place["kernel_block_size"] = BLOCK_SIZE // (2 if "kernel" in runner else 1)
        forget_media()
        self.policy = policy
        self.llm = engine(self.model, self.num_blocks, policy, is_async, sends, load_policy, prefix_caching, **place)
        self.clock: Any = self.llm._clock
        self.media: list[Medium] = [media(name) for name in CHILDREN]
        self.prompts: dict[str, list[int]] = {}
        self.progress: list[Any] = []
        self.moved_at = (0.0, 0)
        self.num_preemptions = 0
        self.num_added = 0
        self.held_until = [0, 0]
        self.llm.connector._claims._clock = self.clock
        self.done: list[list[int]] = []

    # ---- what users do

    @rule(
        document=st.integers(0, len(DOCUMENTS) - 1),
        num_shared=st.one_of(st.integers(1, 40), st.integers(20, 40)),
        own=st.lists(st.integers(0, 499), max_size=3),
        max_tokens=st.integers(1, 12),
        salt=st.sampled_from([None, None, None, "tenant"]),
        faults=st.tuples(*[st.sampled_from([LoadFault.NONE, *LOAD_FAULTS])] * 2),
    )
    def admit(
        self,
        document: int,
        num_shared: int,
        own: list[int],
        max_tokens: int,
        salt: str | None,
        faults: tuple[LoadFault, LoadFault],
    ) -> None:
        fired["admit"] += 1
        if len(self.prompts) >= 8:
            return
        for medium, fault in zip(self.media, faults, strict=True):
            if not medium.faults.loads:
                medium.faults.loads.append(fault)
        self.add(DOCUMENTS[document][:num_shared] + own, max_tokens, salt)

    def add(self, prompt: list[int], max_tokens: int, salt: str | None) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        self.num_added += 1
        request_id = self.llm.add_request(prompt, params, cache_salt=salt, request_id=f"r{self.num_added}")
        self.prompts[request_id] = prompt

    @rule()
    def step(self) -> None:
        fired["step"] += 1
        for output in self.llm.step():
            self.check_output(output)
        self.clock.advance(0.01)
        scheduler = self.llm.scheduler
        fired["preempted"] += scheduler.num_preemptions - self.num_preemptions
        self.num_preemptions = scheduler.num_preemptions
        self.poison_free_blocks()
        self.stored_pages_are_right()
        for medium, until in zip(self.media, self.held_until, strict=True):
            if medium.faults.hold_saves and fired["step"] >= until:
                medium.release()

    @rule(num=st.integers(2, 6))
    def walk_on(self, num: int) -> None:
        fired["walk_on"] += 1
        self.steps(num)

    def steps(self, num: int) -> None:
        for _ in range(num):
            self.step()
            self.books_are_right()

    @precondition(lambda self: self.done)
    @rule(which=st.integers(0, 5), twins=st.integers(1, 3), max_tokens=st.integers(1, 12))
    def come_back(self, which: int, twins: int, max_tokens: int) -> None:
        """A conversation goes on, in several ways: the engine has forgotten it, the connectors may not have."""
        fired["come_back"] += 1
        self.llm.reset_prefix_cache()
        for i in range(twins if len(self.prompts) < 8 else 0):
            self.add(self.done[which % len(self.done)] + [490 + i], max_tokens, None)

    @rule(
        document=st.integers(0, len(DOCUMENTS) - 1),
        num_shared=st.integers(8, 40),
        num_steps=st.integers(4, 10),
        faults=st.tuples(*[st.sampled_from([LoadFault.NONE, *LOAD_FAULTS])] * 2),
    )
    def converse(self, document: int, num_shared: int, num_steps: int, faults: tuple[LoadFault, LoadFault]) -> None:
        """A prompt, some steps, and twice the prompt again with a question: something is loaded, or fails to be."""
        fired["converse"] += 1
        if len(self.prompts) >= 6:
            return
        prompt = DOCUMENTS[document][:num_shared]
        self.add(prompt, 2, None)
        self.steps(num_steps)
        self.llm.reset_prefix_cache()
        for medium, fault in zip(self.media, faults, strict=True):
            medium.faults.loads.appendleft(fault)
        self.add([*prompt, 498], 3, None)
        self.add([*prompt, 497], 3, None)

    @precondition(lambda self: self.prompts)
    @rule(which=st.integers(0, 7))
    def abort(self, which: int) -> None:
        fired["abort"] += 1
        self.llm.abort_request(list(self.prompts)[which % len(self.prompts)])

    @rule(reset_connector=st.sampled_from([False] * 7 + [True]))
    def reset(self, reset_connector: bool) -> None:
        fired["reset"] += 1
        fired["reset done"] += self.llm.reset_prefix_cache(reset_connector)

    @rule(seconds=st.sampled_from([0.1, 1.0, 61.0, 310.0]))
    def wait(self, seconds: float) -> None:
        fired["wait"] += 1
        self.clock.advance(seconds)
        self.step()

    # ---- what goes wrong

    @rule(child=st.integers(0, 1), num=st.integers(1, 3))
    def look_longer(self, child: int, num: int) -> None:
        fired["look_longer"] += 1
        if not self.media[child].faults.answers:
            self.media[child].faults.answers.extend([(None, False)] * num)

    @rule(child=st.integers(0, 1), answer=st.sampled_from(BAD_ANSWERS))
    def answer_badly(self, child: int, answer: Any) -> None:
        fired["answer_badly"] += 1
        if not self.media[child].faults.answers:
            self.media[child].faults.answers.append(answer)

    @rule(child=st.integers(0, 1), fault=st.sampled_from(LOAD_FAULTS))
    def break_load(self, child: int, fault: LoadFault) -> None:
        fired["break_load"] += 1
        self.media[child].faults.loads.append(fault)

    @rule(child=st.integers(0, 1), num_steps=st.integers(1, 12))
    def hold_saves(self, child: int, num_steps: int) -> None:
        fired["hold_saves"] += 1
        self.media[child].faults.hold_saves = True
        self.held_until[child] = fired["step"] + num_steps

    @rule(child=st.integers(0, 1))
    def release(self, child: int) -> None:
        fired["release"] += 1
        self.media[child].release()

    @rule(child=st.integers(0, 1), num_steps=st.integers(0, 4))
    def slow_down(self, child: int, num_steps: int) -> None:
        fired["slow_down"] += 1
        self.media[child].transfer_steps = num_steps

    @rule(child=st.integers(0, 1), hook=st.sampled_from(RAISING_HOOKS), times=st.sampled_from([1, 1, 1, 6]))
    def break_hook(self, child: int, hook: str, times: int) -> None:
        fired["break_hook"] += 1
        self.media[child].faults.raise_in[hook] += times

    @rule(child=st.integers(0, 1))
    def report_ghosts(self, child: int) -> None:
        fired["report_ghosts"] += 1
        self.media[child].faults.ghosts.add("nobody")

    # ---- what must hold

    def check_output(self, output: RequestOutput) -> None:
        """Every token is right; a request that ends is forgotten."""
        tokens, prompt = output.outputs[0].token_ids, self.prompts[output.request_id]
        assert tokens == expected_tokens(self.model, tuple(prompt))[: len(tokens)], "a wrong token"
        assert output.num_cached_tokens < len(prompt) + 1
        if output.finished:
            reason = output.outputs[0].finish_reason
            fired[f"finished: {reason}"] += 1
            assert reason in ("length", "abort") or self.policy == "fail" or "pinned" in str(output.error)
            if reason == "length":
                self.done = [prompt, *self.done[:5]]
            del self.prompts[output.request_id]

    def stored_pages_are_right(self) -> None:
        """Wrong bytes under a good key would be told to somebody one day."""
        for medium in self.media:
            for key in medium.pages.keys() - medium.proved:
                page = medium.pages[key][0].transpose(1, 2).contiguous()  # kernel block, token, head, content
                wanted = expected_page(self.model, key[0], key[2])
                assert bytes(page.view(torch.uint8).numpy()) == wanted, f"a wrong page was stored: {key}"
            medium.proved = set(medium.pages)

    def poison_free_blocks(self) -> None:
        """What is free and cannot be found again may hold anything."""
        free = [b.block_id for b in self.pool.blocks if not b.is_null and b.ref_cnt == 0 and b.block_hash is None]
        for layer in self.llm.kv_caches.values():
            layer.view(self.num_blocks, -1, *layer.shape[1:])[free] = 13.0

    @property
    def pool(self) -> Any:
        return self.llm.scheduler.manager.block_pool

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "llm"):
            return
        self.llm.check_integrity()
        refs = Counter(self.references())
        for medium in self.media:
            written, read = medium.busy_blocks()
            for block_id in written | read:
                assert self.pool.blocks[block_id].ref_cnt > 0, f"block {block_id} is free, but a transfer uses it"
        if not self.llm.counters.switched_off:
            for block in self.pool.blocks:
                assert block.ref_cnt == refs[block.block_id], f"block {block.block_id}: {block.ref_cnt} holders"
        self.somebody_moves()

    def references(self) -> list[int]:
        """Block ids, once per rightful holder: tables, held blocks, pins."""
        scheduler = self.llm.scheduler
        ids = [block.block_id for block in scheduler.transfers.held_blocks()]
        for request in scheduler._requests.values():
            ids += [i for table in scheduler.manager.get_block_ids(request.request_id) for i in table if i]
        return ids + [block_id for medium in self.media for block_id in medium.pinned_blocks()]

    def somebody_moves(self) -> None:
        """Deadlines end every wait, one request after the other; only steps notice."""
        requests = [self.llm.scheduler._requests.get(request_id) for request_id in self.prompts]
        progress = [(r.request_id, r.num_tokens, r.num_computed_tokens, r.num_load_failures) for r in requests if r]
        if progress != self.progress or not progress:
            self.progress, self.moved_at = progress, (self.clock.now(), fired["step"])
        waited_s, waited_steps = self.clock.now() - self.moved_at[0], fired["step"] - self.moved_at[1]
        assert waited_s <= STUCK_AFTER_S or waited_steps <= 5, f"nothing moves for {waited_s} s: {progress}"

    def teardown(self) -> None:
        if not hasattr(self, "llm"):
            return
        for medium in self.media:
            faults = medium.faults
            for queue in (faults.answers, faults.loads, faults.raise_in, faults.ghosts):
                queue.clear()
            medium.release()
        for _ in range(400):
            if not (self.llm.has_requests() or self.llm.scheduler.transfers.held):
                break
            self.step()
            self.books_are_right()
        assert not self.prompts, f"unfinished at the end: {sorted(self.prompts)}"
        assert not self.llm.has_requests(), "the engine never comes to rest"
        assert self.pool.get_num_free_blocks() == self.num_blocks - 1, "blocks leaked"
        for medium in self.media:
            fired.update({f"medium: {what}": num for what, num in medium.num_done.items()})
        self.llm.shutdown()


class GroupsMachine(ContractMachine):
    """One walk with three groups: block ids that mean one group's layers, windows that leave blocks behind."""

    model = StubModel(windows=[None, 6, 10])
    num_blocks = 49
