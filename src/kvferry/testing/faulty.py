"""A small, right connector that does wrong exactly what a test tells it to.

`FaultyConnector` keeps single blocks in a `Medium`, an object of this process that the test finds by name and through
which it sets faults: lookups that answer None or nonsense, loads that lose blocks, fail, come late or are reported
twice, saves and sends that take long, hooks that raise. Without faults it stores and loads correctly, so that every
wrong token of an engine under test is the engine's (or a MultiConnector's) mistake.

    media("a").faults.loads.append(LoadFault.BAD_BLOCK)

Settings (`kv_connector_extra_config`): `medium` (name), `load_async`, `send_on_finish` (a finished request's blocks are
read after its end, so that their release is delayed).
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from kvferry.contract import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    LoadFailure,
    SupportsHMA,
)
from kvferry.contract.host import groups_of
from kvferry.engine.kv_manager import longest_hit
from kvferry.types import NULL_BLOCK_ID

if TYPE_CHECKING:
    import torch

PageKey = tuple[int, str | None, tuple[int, ...]]
"""(group, cache salt, all tokens up to the block's end)."""


class LoadFault(Enum):
    """What goes wrong with one load."""

    NONE = "none"
    BAD_BLOCK = "bad_block"  # garbage in one block, reported by its id
    BAD_POSITION = "bad_position"  # garbage in one block, reported by request, group and position
    FAILED = "failed"  # garbage everywhere, the whole request reported
    RAISE = "raise"  # garbage everywhere, the hook raises
    LATE = "late"  # does not end before `Medium.release`
    TWICE = "twice"  # good, and reported again in the next step


@dataclass(slots=True)
class ConnectorFaults:
    """What the next operations do. Queues are used up front to back; empty means: do it right."""

    answers: deque[Any] = field(default_factory=deque)
    """Answers to lookups in place of the true one; an Exception is raised."""
    loads: deque[LoadFault] = field(default_factory=deque)
    raise_in: Counter[str] = field(default_factory=Counter)
    """Hook -> how many of its next calls raise."""
    ghosts: set[str] = field(default_factory=set)
    """Request ids to report as sent and received once, whoever they are."""
    hold_saves: bool = False
    """Saves and sends do not end before `Medium.release`."""


class Medium:
    """What one connector has stored, and its faults. `transfer_steps`: how many steps a load, save or send takes."""

    def __init__(self) -> None:
        self.pages: dict[PageKey, list[torch.Tensor]] = {}
        self.faults = ConnectorFaults()
        self.transfer_steps = 1
        self.num_done: Counter[str] = Counter()
        self.proved: set[PageKey] = set()
        """Pages that a test has looked at."""
        self.workers: list[FaultyConnector] = []
        self.schedulers: list[FaultyConnector] = []

    def release(self) -> None:
        """Let everything late end in the steps that come."""
        self.faults.hold_saves = False
        for worker in self.workers:
            worker.release()

    def busy_blocks(self) -> tuple[set[int], set[int]]:
        """(blocks that loads under way write to, blocks that saves and sends under way read from)."""
        written: set[int] = set()
        read: set[int] = set()
        for worker in self.workers:
            for job in worker.jobs:
                (written if job.is_load else read).update(block_id for _, _, block_id in job.pages)
        return written, read

    def pinned_blocks(self) -> list[int]:
        """Blocks that saves have pinned, once per pin."""
        return [block_id for side in self.schedulers for job in side.jobs for _, _, block_id in job.pages]


_MEDIA: defaultdict[str, Medium] = defaultdict(Medium)


def media(name: str) -> Medium:
    """The medium of that name; made when first asked for."""
    return _MEDIA[name]


def forget_media() -> None:
    """Start over with empty media."""
    _MEDIA.clear()


@dataclass(slots=True)
class _FaultyJob:
    """One load, save or send under way on the worker."""

    job_id: int
    request_id: str
    pages: list[tuple[PageKey, int, int]]
    """(key, position in the group's block table, block id)."""
    is_load: bool = False
    is_send: bool = False
    fault: LoadFault = LoadFault.NONE
    steps_left: int = 0
    reads: frozenset[int] = frozenset()
    """Saves: all blocks of the request when the step was planned."""
    is_tainted: bool = False
    """Saves: computed in a step that read KV which had failed to load."""


@dataclass(slots=True)
class _Orders(KVConnectorMetadata):
    sync_loads: list[_FaultyJob] = field(default_factory=list)
    jobs: list[_FaultyJob] = field(default_factory=list)


@dataclass(slots=True)
class _Saved(KVConnectorWorkerMetadata):
    pages: dict[int, list[tuple[PageKey, list[torch.Tensor]]]]
    """Job id -> what was read."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> _Saved:
        """One rank only."""
        raise NotImplementedError("FaultyConnector runs on one rank")


class FaultyConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. One rank, one process; block sizes of all groups are equal."""

    requires_kv_delivery = False
    supports_v2_model_runner = True

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self.medium = media(extra.get("medium", "faulty"))
        self._is_async = bool(extra.get("load_async", True))
        self._sends = bool(extra.get("send_on_finish", False))
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._groups = groups_of(kv_cache_config)
        self.jobs: list[_FaultyJob] = []
        """Worker: under way. Scheduler: saves whose blocks are pinned."""
        (self.medium.workers if role is KVConnectorRole.WORKER else self.medium.schedulers).append(self)
        self._requests: dict[str, Any] = {}
        self._num_local: dict[str, int] = {}
        self._loading: set[str] = set()
        self._failed: set[str] = set()
        self._num_jobs = 0
        self._orders = _Orders()
        self._pool: Any = None
        self._results = KVConnectorTransferResults()
        self._bad_blocks: set[int] = set()
        self._saved: dict[int, list[tuple[PageKey, list[torch.Tensor]]]] = {}
        self._repeat: set[str] = set()

    def _enter(self, hook: str) -> None:
        if self.medium.faults.raise_in[hook] > 0:
            self.medium.faults.raise_in[hook] -= 1
            raise RuntimeError(f"set to fail in {hook}")

    # ---- scheduler: lookup and load ---------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """For pins."""
        self._pool = gpu_block_pool

    def on_new_request(self, request: Any) -> None:
        """Remember the request."""
        self._enter("on_new_request")
        self._requests[request.request_id] = request

    def _key(self, request: Any, group: int, index: int) -> PageKey:
        return group, request.cache_salt, tuple(request.all_token_ids[: (index + 1) * self._block_size])

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        """The stored prefix, or the next answer the test has set."""
        self._enter("get_num_new_matched_tokens")
        if self.medium.faults.answers:
            answer = self.medium.faults.answers.popleft()
            if isinstance(answer, Exception):
                raise answer
            return answer
        if request.request_id in self._failed | self._loading:
            return 0, False
        limit = request.num_tokens if self._is_async else request.num_tokens - 1
        has = partial(self._has, request, num_computed_tokens // self._block_size)
        self._num_local[request.request_id] = num_computed_tokens
        num = longest_hit(self._groups, limit // self._block_size, has) * self._block_size - num_computed_tokens
        return max(0, num), self._is_async and num > 0

    def _has(self, request: Any, num_local_blocks: int, group: int, index: int) -> bool:
        return index < num_local_blocks or self._key(request, group, index) in self.medium.pages

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load."""
        self._enter("update_state_after_alloc")
        if not num_external_tokens:
            return
        first = self._num_local[request.request_id]
        indexes = range(first // self._block_size, (first + num_external_tokens) // self._block_size)
        job = self._job(request.request_id, self._pages(request, blocks.get_block_ids(), indexes), is_load=True)
        if self.medium.faults.loads:
            job.fault = self.medium.faults.loads.popleft()
        (self._orders.jobs if self._is_async else self._orders.sync_loads).append(job)
        if self._is_async:
            self._loading.add(request.request_id)

    def _pages(self, request: Any, tables: Any, indexes: range) -> list[tuple[PageKey, int, int]]:
        return [
            (self._key(request, group, index), index, table[index])
            for group, table in enumerate(tables)
            for index in indexes
            if index < len(table) and table[index] != NULL_BLOCK_ID
        ]

    def _job(
        self, request_id: str, pages: list[tuple[PageKey, int, int]], *, is_load: bool = False, is_send: bool = False
    ) -> _FaultyJob:
        self._num_jobs += 1
        return _FaultyJob(self._num_jobs, request_id, pages, is_load, is_send, steps_left=self.medium.transfer_steps)

    # ---- scheduler: save and send -----------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: Any) -> _Orders:
        """Loads planned since the last step, and saves of the blocks this step fills, pinned until they are read."""
        self._enter("build_connector_meta")
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        orders, self._orders = self._orders, _Orders()
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            if request is None:
                continue
            tables = scheduler_output.kv_connector_block_state.get_block_ids(request_id)
            start = computed[request_id]
            indexes = range(start // self._block_size, (start + num_tokens) // self._block_size)
            pages = [page for page in self._pages(request, tables, indexes) if page[0] not in self.medium.pages]
            if pages:
                job = self._job(request_id, pages)
                job.reads = frozenset(block_id for table in tables for block_id in table)
                self._pool.touch([self._pool.blocks[block_id] for _, _, block_id in pages])
                self.jobs.append(job)
                orders.jobs.append(job)
        return orders

    def update_connector_output(self, connector_output: Any) -> None:
        """Keep what was saved, unless the step it was computed in read KV that had failed to load."""
        self._loading -= connector_output.finished_recving or set()
        self._failed |= connector_output.failed_recving
        report = connector_output.kv_connector_worker_meta
        saved = report.pages if isinstance(report, _Saved) else {}
        bad_block_ids = connector_output.invalid_block_ids
        self._remember_failures(bad_block_ids)
        for job in list(self.jobs):
            job.is_tainted |= not job.reads.isdisjoint(bad_block_ids)
            if job.job_id in saved:
                self.jobs.remove(job)
                self._pool.free_blocks([self._pool.blocks[block_id] for _, _, block_id in job.pages])
                if not job.is_tainted:
                    self.medium.pages.update(saved[job.job_id])
                    self.medium.num_done["saves"] += 1

    def _remember_failures(self, bad_block_ids: set[int]) -> None:
        """Claim nothing more for requests that have one of these blocks, so that a lasting failure cannot loop."""
        for request_id in self._requests if bad_block_ids else ():
            tables = self._kv_cache_manager.get_block_ids(request_id)
            if any(bad_block_ids.intersection(table) for table in tables):
                self._failed.add(request_id)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """With `send_on_finish`, the blocks are read (and kept) before they may be freed."""
        self._requests.pop(request.request_id, None)
        self._failed.discard(request.request_id)
        self._enter("request_finished")
        if request.request_id in self._loading or not self._sends or not any(block_ids):
            return False, None
        indexes = range(request.num_computed_tokens // self._block_size)
        self._orders.jobs.append(self._job(request.request_id, self._pages(request, block_ids, indexes), is_send=True))
        return True, {"medium": id(self.medium)}

    def has_pending_push_work(self) -> bool:
        """While a save is out and nobody holds it back."""
        return bool(self._orders.jobs or self.jobs) and not self.medium.faults.hold_saves

    def reset_cache(self) -> bool:
        """Forget all pages."""
        self._enter("reset_cache")
        self.medium.pages.clear()
        return True

    # ---- worker -----------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Layers by group, each [blocks, kernel blocks in a block, heads, tokens, content]."""
        num_blocks = self._kv_cache_config.num_blocks
        layers = {name: tensor.view(num_blocks, -1, *tensor.shape[1:]) for name, tensor in kv_caches.items()}
        self._layers = [[layers[name] for name in group.layer_names] for group in self._kv_cache_config.kv_cache_groups]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Run synchronous loads, take over the rest."""
        orders = self._get_connector_metadata()
        assert isinstance(orders, _Orders)
        self.jobs.extend(orders.jobs)
        self._enter("start_load_kv")
        for job in orders.sync_loads:
            self._load(job)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are over before the forward."""
        self._enter("wait_for_layer_load")

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks are saved after the forward."""

    def wait_for_save(self) -> None:
        """Saves go on in the background."""
        self._enter("wait_for_save")

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """What ended in this step, and what the test wants reported."""
        self._enter("get_transfer_results")
        repeat, self._repeat = self._repeat, set()
        for job in list(self.jobs):
            if not self._is_due(job):
                job.steps_left -= 1
                continue
            self.jobs.remove(job)
            if job.is_load:
                self._load(job)
                self._results.finished_recving.add(job.request_id)
            else:
                self._save(job)
        results, self._results = self._results, KVConnectorTransferResults()
        ghosts, self.medium.faults.ghosts = self.medium.faults.ghosts, set()
        results.finished_sending |= ghosts
        # Nobody could tell the repeated report of a load from that of the request's next one.
        results.finished_recving |= ghosts | (repeat - {job.request_id for job in self.jobs if job.is_load})
        return results

    def _is_due(self, job: _FaultyJob) -> bool:
        is_held = job.fault is LoadFault.LATE if job.is_load else self.medium.faults.hold_saves
        return job.steps_left <= 0 and not is_held

    def release(self) -> None:
        """Late loads may end."""
        for job in self.jobs:
            if job.fault is LoadFault.LATE:
                job.fault = LoadFault.NONE

    def _load(self, job: _FaultyJob) -> None:
        self.medium.num_done[f"load {job.fault.value}"] += 1
        bad_index = len(job.pages) // 2
        for i, (key, index, block_id) in enumerate(job.pages):
            pages = self.medium.pages.get(key)
            is_bad = pages is None or job.fault in (LoadFault.FAILED, LoadFault.RAISE)
            is_bad |= i == bad_index and job.fault in (LoadFault.BAD_BLOCK, LoadFault.BAD_POSITION)
            for number, layer in enumerate(self._layers[key[0]]):
                layer[block_id] = layer.new_full((), 7.0) if is_bad or pages is None else pages[number]
            if is_bad:
                self._report_bad(job, key[0], index, block_id)
        if job.fault is LoadFault.TWICE:
            self._repeat.add(job.request_id)
        if job.fault is LoadFault.RAISE and not self._is_async:
            raise RuntimeError("set to fail while loading")

    def _report_bad(self, job: _FaultyJob, group: int, index: int, block_id: int) -> None:
        if job.fault is LoadFault.BAD_POSITION:
            self._results.failed_blocks.add(LoadFailure(job.request_id, group, index))
        elif self._is_async and job.fault in (LoadFault.FAILED, LoadFault.RAISE):
            self._results.failed_recving.add(job.request_id)
        elif job.fault is not LoadFault.RAISE:
            self._bad_blocks.add(block_id)

    def _save(self, job: _FaultyJob) -> None:
        pages = [(key, [layer[block_id].clone() for layer in self._layers[key[0]]]) for key, _, block_id in job.pages]
        if job.is_send:
            self.medium.num_done["sends"] += 1
            self.medium.pages.update(pages)
            self._results.finished_sending.add(job.request_id)
        else:
            self._saved[job.job_id] = pages

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that were given garbage."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def build_connector_worker_meta(self) -> _Saved | None:
        """What was saved."""
        saved, self._saved = self._saved, {}
        return _Saved(saved) if saved else None

    def shutdown(self) -> None:
        """Nothing runs on."""
        self.jobs.clear()
