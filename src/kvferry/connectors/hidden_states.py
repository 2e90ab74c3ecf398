"""ExampleHiddenStatesConnector: hidden states of each prompt in a safetensors file (docs/guides/hidden_states.md).

    <shared_storage_path>/<request id>-<random>.safetensors         hidden_states [tokens, states, hidden], token_ids
    <shared_storage_path>/<request id>-<random>.safetensors.tmp     that is being written
    <shared_storage_path>/<request id>-<random>.safetensors.error   in its place when it could not be written

The file is ordered in the step that computes the last token of the prompt, and written by a thread: no hook waits for
it. The path comes back as `kv_transfer_params["hidden_states_path"]` when the request ends; a file is whole as soon as
it is there (`load_hidden_states` waits for that). Requests that end with an abort or an error leave none.

Rows come in two ways. Our engine hands over those of each step (`kvferry.engine.hidden_states`), and they are kept
here until the prompt is whole. vLLM (`extract_hidden_states`) pages them, as a KV cache group of their own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from kvferry.clock import Clock, SystemClock
from kvferry.config import parse_settings
from kvferry.contract.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from kvferry.contract.facade import facade_mixin
from kvferry.contract.host import HostInfo
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.sides import SchedulerSide, WorkerSide
from kvferry.contract.views import BlockIds, RequestView, StepView
from kvferry.errors import ConfigError, TierUnavailable
from kvferry.store.io_threads import IoThreads, Urgency
from kvferry.types import GroupInfo

logger = logging.getLogger(__name__)

_WHERE = "kv_connector_extra_config"
_LAYER_MARK = "cache_only_layers."
"""In the name of the layer that both hosts hand hidden states on by."""
_OURS = re.compile(r"[\w-]{1,64}-[0-9a-f]{16}\.safetensors(\.error)?(\.tmp)?", re.ASCII)
_SWEEP_EVERY_S = 60.0
_CLOSE_LIMIT_S = 30.0
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class HiddenStatesConfig:
    """Settings, in `kv_connector_extra_config`."""

    shared_storage_path: str
    """The folder; made where missing."""
    ttl_s: float | None = field(default=86400.0, metadata={"minimum": 1})
    """Files older than this are deleted, those of other engines in the folder too; null: none ever."""
    max_pending_bytes: int = field(default=1 << 30, metadata={"minimum": 1})
    """What may wait to be written; hidden states beyond that are dropped, which their `.error` file tells."""

    @classmethod
    def parse(cls, host: HostInfo) -> HiddenStatesConfig:
        """Read the settings; ConfigError also when the engine hands on no hidden states."""
        config = parse_settings(cls, host.extra_config, _WHERE)
        if not host.hidden_state_layers:
            raise ConfigError(
                "the ExampleHiddenStatesConnector gets no hidden states from this engine: give it hidden_state_layers; "
                'vLLM, speculative_config={"method": "extract_hidden_states", "num_speculative_tokens": 1, '
                '"draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [...]}}}'
            )
        if host.pp_size > 1:
            raise ConfigError(f"pipeline_parallel_size={host.pp_size}: hidden states need one pipeline stage")
        return config


@dataclass(frozen=True, slots=True)
class StepPart:
    """Tokens [first, first + num_tokens) of a request, computed in this step into these blocks (the last may go on)."""

    request_id: str
    first: int
    num_tokens: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """A prompt that is whole after this step, the file it goes to, and its blocks."""

    request_id: str
    name: str
    token_ids: list[int]
    block_ids: list[int]


@dataclass(slots=True)
class HiddenStatesMetadata(KVConnectorMetadata):
    """A step's orders."""

    parts: list[StepPart] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    discards: list[str] = field(default_factory=list)
    """Files that nobody will be told of."""
    finished_ids: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Prompt:
    token_ids: list[int]
    name: str = ""
    """Of its file, once that is ordered."""
    block_ids: frozenset[int] = frozenset()


class HiddenStatesSchedulerSide(SchedulerSide):
    """Knows when a prompt is whole, and tells paths."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self._files = FileFolder(HiddenStatesConfig.parse(host).shared_storage_path)
        self._group = _hidden_group(host) or host.groups[0]
        self._is_paged = _hidden_group(host) is not None
        self._prompts: dict[str, _Prompt] = {}
        self._discards: list[str] = []

    def on_new_request(self, request: RequestView) -> None:
        """All its tokens so far are its prompt."""
        self._prompts[request.request_id] = _Prompt(list(request.token_ids))
        if (request.kv_transfer_params or {}).get("hidden_states_path") is not None:
            logger.warning("%s: hidden_states_path is ignored: the engine names files", request.request_id)

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Nothing is ever loaded."""
        return 0, False

    def update_state_after_alloc(self, request: RequestView, block_ids: BlockIds, num_external_tokens: int) -> None:
        """Nothing to plan."""

    def build_connector_meta(self, step: StepView) -> HiddenStatesMetadata:
        """What the step computes, and a file for each prompt that it completes."""
        metadata = HiddenStatesMetadata(discards=self._discards, finished_ids=step.finished_req_ids)
        self._discards = []
        for item in step.scheduled:
            prompt = self._prompts.get(item.request_id)
            if prompt is None:
                continue
            first, end = item.num_computed_tokens, item.num_computed_tokens + item.num_scheduled_tokens
            size, table = self._group.block_tokens, item.block_ids[self._group.group_id]
            num_prompt = len(prompt.token_ids)
            is_wanted = first < num_prompt and not prompt.name
            if is_wanted or self._is_paged:
                blocks = table[first // size : -(-end // size)]
                metadata.parts.append(StepPart(item.request_id, first, item.num_scheduled_tokens, blocks))
            if is_wanted and end >= num_prompt:
                prompt.name = _file_name(item.request_id)
                prompt.block_ids = frozenset().union(*item.block_ids)
                blocks = table[: -(-num_prompt // size)]
                metadata.saves.append(SaveOrder(item.request_id, prompt.name, prompt.token_ids, blocks))
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What was computed over blocks that another connector failed to load is wrong, and computed again."""
        for prompt in self._prompts.values() if connector_output.invalid_block_ids else ():
            if prompt.name and prompt.block_ids & connector_output.invalid_block_ids:
                self._discards.append(prompt.name)
                prompt.name = ""

    def request_finished(self, request: RequestView, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """The path of the prompt's file; its blocks may be freed, since no copy of ours reads them any more."""
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is None or not prompt.name:
            return False, None
        if request.was_cut_short:
            self._discards.append(prompt.name)
            return False, None
        return False, {"hidden_states_path": str(self._files.path / prompt.name)}

    def shutdown(self) -> None:
        """Delete what the worker was not told to delete; it has stopped by now."""
        for name in self._discards:
            self._files.discard(name)
        self._files.close()


@dataclass(frozen=True, slots=True)
class _Job:
    run: Callable[[], None]
    num_bytes: int = 0


class HiddenStatesWorkerSide(WorkerSide):
    """Collects rows and has them written. Every rank has all of them, so only the first one does."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self.config = HiddenStatesConfig.parse(host)
        self.clock: Clock = SystemClock()
        self._files = FileFolder(self.config.shared_storage_path)
        self._writer = IoThreads[_Job]("kvferry-hidden-states", 1, lambda job: job.run())
        self._num_pending_bytes = 0
        self._next_sweep_s = self.clock.now()
        self._pages: torch.Tensor | None = None
        """[kernel blocks, states, tokens, hidden] in vLLM."""
        self._bad_blocks: set[int] = set()
        """Blocks of the pages that a step should have written to and did not."""
        self._kept: dict[str, list[torch.Tensor]] = {}
        """Rows [tokens, states, hidden] of prompts that are not whole yet, step by step, where there are no pages."""
        self._step_rows: tuple[torch.Tensor, Any] | None = None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the pages, if there are any."""
        group = _hidden_group(self.host)
        self._group_tokens = (group or self.host.groups[0]).block_tokens
        if group is not None:
            (self._pages,) = (kv_caches[name] for name in group.layer_names if _LAYER_MARK in name)

    def handle_preemptions(self, metadata: KVConnectorMetadata) -> None:
        """The first hook of a step: rows of one that broke are forgotten."""
        self._step_rows = None

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Nothing is ever loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any) -> None:
        """Note that this step's hidden states are there."""
        if _LAYER_MARK in layer_name:
            self._step_rows = kv_layer, attn_metadata

    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        """Take this step's rows, and order what is to be written, deleted and swept; waits for none of it."""
        assert isinstance(metadata, HiddenStatesMetadata)
        step_rows, self._step_rows = self._step_rows, None
        if self.host.rank:
            return
        for part in metadata.parts:
            if self._pages is not None:
                self._note_blocks(part, step_rows is not None)
            elif step_rows is not None:
                self._keep(part, *step_rows)
        for order in metadata.saves:
            self._save(order)
        for request_id in metadata.finished_ids:
            self._kept.pop(request_id, None)
        for name in metadata.discards:
            self._submit(partial(self._files.discard, name))
        self._sweep_when_due()
        self._note_done()

    def _keep(self, part: StepPart, rows: torch.Tensor, batch: Any) -> None:
        """Our engine's rows: the request's are those from its first position, in its block, on."""
        is_start = (batch.write_blocks[0] == part.block_ids[0]) & (batch.positions == part.first)
        start = int(is_start.nonzero()[0])
        kept = self._kept.setdefault(part.request_id, [])
        if part.first == 0:  # again after a preemption
            kept.clear()
        kept.append(rows[start : start + part.num_tokens].clone())

    def _note_blocks(self, part: StepPart, is_written: bool) -> None:
        """vLLM writes none in a step in which some request comes within one token of max_model_len."""
        if not is_written:
            self._bad_blocks.update(part.block_ids)
        else:  # those are whole again that are written from their first token on
            self._bad_blocks.difference_update(part.block_ids[part.first % self._group_tokens > 0 :])

    def _save(self, order: SaveOrder) -> None:
        rows = self._rows(order)
        problem = "some of its hidden states were never computed" if rows is None else None
        num_bytes = 0 if rows is None else rows.nbytes
        if self._num_pending_bytes + num_bytes > self.config.max_pending_bytes:
            problem = f"more than max_pending_bytes={self.config.max_pending_bytes} wait to be written"
        if rows is None or problem is not None:
            logger.warning("%s is not written: %s", order.name, problem)
            self._submit(partial(self._files.write, f"{order.name}.error", str(problem).encode()))
            return
        self._num_pending_bytes += num_bytes
        ready = None
        if rows.device.type != "cpu":
            ready = torch.Event(device=rows.device)
            ready.record(torch.accelerator.current_stream(rows.device))
        self._submit(partial(self._write, order, rows, ready), num_bytes)

    def _rows(self, order: SaveOrder) -> torch.Tensor | None:
        """A copy [tokens, states, hidden] of the prompt's rows; None when some are missing."""
        num_tokens = len(order.token_ids)
        if self._pages is None:
            kept = self._kept.pop(order.request_id, [])
            return torch.cat(kept)[:num_tokens] if sum(map(len, kept)) >= num_tokens else None
        if not self._bad_blocks.isdisjoint(order.block_ids):
            return None
        blocks = torch.tensor(order.block_ids, device=self._pages.device)[:, None] * self._group_tokens
        places = (blocks + torch.arange(self._group_tokens, device=self._pages.device)).flatten()[:num_tokens]
        size = self._pages.shape[2]
        return self._pages[places // size, :, places % size]

    def _write(self, order: SaveOrder, rows: torch.Tensor, ready: Any) -> None:
        """On the writer's thread."""
        if ready is not None:
            ready.synchronize()
        tensors = {"hidden_states": rows.cpu().contiguous(), "token_ids": torch.tensor(order.token_ids)}
        about = {"hidden_state_layers": json.dumps(self.host.hidden_state_layers), "model": self.host.model}
        try:
            self._files.write(order.name, save(tensors, about))
        except OSError as err:
            self._files.write(f"{order.name}.error", str(err).encode())
            raise

    def _submit(self, run: Callable[[], None], num_bytes: int = 0) -> None:
        self._writer.submit(Urgency.STORE, _Job(run, num_bytes))

    def _sweep_when_due(self) -> None:
        ttl_s, now_s = self.config.ttl_s, self.clock.now()
        if ttl_s is not None and now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + min(ttl_s, _SWEEP_EVERY_S)
            self._submit(partial(self._files.sweep, time.time() - ttl_s))

    def _note_done(self) -> None:
        for done in self._writer.take_done():
            self._num_pending_bytes -= done.work.num_bytes
            if done.error is not None:
                logger.warning("in %s: %s", self._files.path, done.error)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Nothing: no copy reads the pool after its step."""
        return KVConnectorTransferResults()

    def shutdown(self) -> None:
        """Write what is ordered; blocks for at most half a minute."""
        self._writer.drain(_CLOSE_LIMIT_S)
        if self._writer.close(_CLOSE_LIMIT_S):
            self._files.close()
        self._note_done()


class FileFolder:
    """The folder of the files, held open: names are looked up in it and nowhere else, and links are not followed."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser().absolute()
        where = f"{_WHERE}.shared_storage_path={path!r}"
        try:
            for folder in (*reversed(self.path.parents), self.path):
                folder.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as err:
            raise ConfigError(f"{where}: {err}") from err
        about = os.fstat(self._fd)
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            self.close()
            raise ConfigError(f"{where} is writable for other users, who could exchange files: choose another folder")

    def write(self, name: str, data: bytes) -> None:
        """Make a file appear, whole. OSError: there is none."""
        partial = f"{name}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(partial, flags, 0o600, dir_fd=self._fd), "wb") as stream:
                stream.write(data)
            os.rename(partial, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError:
            self.discard(partial)
            raise

    def discard(self, name: str) -> None:
        """Delete a file, or what stands in its place. OSError when that is not allowed."""
        for each in (name, f"{name}.error"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(each, dir_fd=self._fd)

    def sweep(self, oldest_s: float) -> None:
        """Delete files of ours last written before `oldest_s` (seconds since the epoch)."""
        for name in filter(_OURS.fullmatch, os.listdir(self._fd)):
            with contextlib.suppress(FileNotFoundError):
                about = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
                if stat.S_ISREG(about.st_mode) and about.st_mtime < oldest_s:
                    os.unlink(name, dir_fd=self._fd)

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._fd)


def load_hidden_states(path: str | Path, timeout_s: float = 30.0) -> dict[str, torch.Tensor]:
    """What is in the file of a path that a request returned: "hidden_states" [tokens, states, hidden], "token_ids".

    Waits for the file, at most `timeout_s` seconds. Raises TierUnavailable when it does not come, or says why when
    it will not.
    """
    deadline_s = time.monotonic() + timeout_s
    failure = Path(f"{path}.error")
    while not Path(path).exists():
        if failure.exists():
            raise TierUnavailable(f"{path} was not written: {failure.read_text()}")
        if time.monotonic() >= deadline_s:
            raise TierUnavailable(f"{path} is not there after {timeout_s} s")
        time.sleep(_POLL_S)
    tensors: dict[str, torch.Tensor] = load_file(path)
    return tensors


def _hidden_group(host: HostInfo) -> GroupInfo | None:
    """The KV cache group that hidden states are paged in, where the host does that."""
    return next((group for group in host.groups if any(_LAYER_MARK in name for name in group.layer_names)), None)


def _file_name(request_id: str) -> str:
    """Unguessable, and a plain name whatever the id is."""
    readable = re.sub(r"[^\w-]", "_", request_id, flags=re.ASCII)[:64] or "_"
    return f"{readable}-{secrets.token_hex(8)}.safetensors"


class ExampleHiddenStatesConnector(
    facade_mixin(HiddenStatesSchedulerSide, HiddenStatesWorkerSide, KVConnectorRole.SCHEDULER),  # type: ignore[misc]
    KVConnectorBase_V1,
    SupportsHMA,
):
    """Writes hidden states of prompts to files; settings: `HiddenStatesConfig`."""
