"""ExampleHiddenStatesConnector: hidden states of each prompt in a safetensors file (docs/guides/hidden_states.md).

    <shared_storage_path>/<request id>-<random>.safetensors         hidden_states [tokens, states, hidden], token_ids
    <shared_storage_path>/<request id>-<random>.safetensors.tmp     that is being written
    <shared_storage_path>/<request id>-<random>.safetensors.error   in its place when there is none: why

The file is ordered in the step that computes the prompt's last token, and written by a thread. Its path comes back
when the request ends; it is whole as soon as it is there, which `load_hidden_states` waits for. Our engine hands over
the rows of each step (`kvferry.engine.hidden_states`), and they are kept here until the prompt is whole. vLLM
(`extract_hidden_states`) pages them, as a KV cache group of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kvferry.clock import Clock, SystemClock
from kvferry.config import VllmsOwn, parse_settings, without_vllms_own
from kvferry.contract.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from kvferry.contract.facade import facade_mixin
from kvferry.contract.host import HIDDEN_STATE_LAYER, HostInfo
from kvferry.contract.identity import KeyMaker, settings_identity
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.sides import SchedulerSide, WorkerSide
from kvferry.contract.views import BlockIds, RequestView, StepView
from kvferry.errors import ConfigError, TierCorrupt, TierUnavailable
from kvferry.kv.keys import DIGEST_BYTES, digest
from kvferry.kv.space import folder_of, unwritable
from kvferry.offloading.tiers.io_threads import IoThreads, Urgency

logger = logging.getLogger(__name__)

_WHERE = "kv_connector_extra_config"
_VLLMS_OWN: VllmsOwn = {
    "num_writer_threads": ((), "one thread writes; max_pending_files limits what waits; leave the key out"),
    "allow_custom_save_path": ((False,), "clients choose no paths; leave the key out"),
    "use_synchronization_lock": ((True, False), "a file appears when it is whole; leave the key out"),
}
_OURS = re.compile(r"[\w-]{1,64}-[0-9a-f]{16}\.safetensors(\.error)?(\.tmp)?", re.ASCII)
_SWEEP_EVERY_S = 60.0
_CLOSE_LIMIT_S = 30.0
_POLL_S = 0.01
_NO_DIGEST = "0" * 2 * DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class HiddenStatesConfig:
    """Settings, in `kv_connector_extra_config`."""

    shared_storage_path: str
    """Folder of the files, made where missing."""
    ttl_s: float | None = field(default=86400.0, metadata={"minimum": 1})
    """Age, in seconds, after which a file is deleted, also a file of another engine in the folder; null: never."""
    max_pending_files: int = field(default=64, metadata={"minimum": 1})
    """Largest number of files that wait to be written. Further files are dropped, and their `.error` files say so."""

    @classmethod
    def parse(cls, host: HostInfo) -> HiddenStatesConfig:
        """Read the settings; ConfigError also when the engine hands on no hidden states."""
        own = without_vllms_own(host.extra_config, _VLLMS_OWN, _WHERE, "ExampleHiddenStatesConnector")
        config = parse_settings(cls, own, _WHERE)
        if not host.hidden_state_layers:
            raise ConfigError(
                "the ExampleHiddenStatesConnector gets no hidden states from this engine: give it hidden_state_layers; "
                'vLLM, speculative_config={"method": "extract_hidden_states", "num_speculative_tokens": 1, '
                '"draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": [...]}}}'
            )
        if host.pp_size > 1:
            raise ConfigError(f"pipeline_parallel_size={host.pp_size}: hidden states need a single stage")
        return config

    def folder(self) -> Path:
        """The folder, made. ConfigError unless it is safe from other users."""
        where = f"{_WHERE}.shared_storage_path"
        path = folder_of(self.shared_storage_path, where).resolve()
        try:
            for folder in (*reversed(path.parents), path):
                folder.mkdir(mode=0o700, exist_ok=True)
            about = path.stat()
        except OSError as err:
            raise ConfigError(f"{where}={self.shared_storage_path!r}: {err}") from err
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            raise ConfigError(
                f"{where}={self.shared_storage_path!r}: other users can write there and exchange files; "
                "choose a folder of your own, or one that is not there yet"
            )
        return path


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A prompt that is whole after the step, its file, and the blocks that hold it."""

    name: str
    token_ids: list[int]
    block_ids: list[int]
    identity: str
    """Of settings, layers, cache salt, adapter and media, beside the tokens; empty while the adapter is uncertain."""


@dataclass(frozen=True, slots=True)
class StepPart:
    """Tokens [first, first + num_tokens) of a prompt, computed in the step; the first of them into `block_id`."""

    request_id: str
    first: int
    num_tokens: int
    block_id: int
    file: PromptFile | None


@dataclass(slots=True)
class HiddenStatesMetadata(KVConnectorMetadata):
    """A step's orders."""

    parts: list[StepPart] = field(default_factory=list)
    discards: list[str] = field(default_factory=list)
    """Files that nobody will be told of."""
    finished_ids: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Prompt:
    token_ids: list[int]
    identity: str
    name: str = ""
    """Of its file, once that is ordered."""
    block_ids: frozenset[int] = frozenset()


class HiddenStatesSchedulerSide(SchedulerSide):
    """Knows when a prompt is whole, and tells paths. Loads nothing."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self._folder = HiddenStatesConfig.parse(host).folder()
        self._group = host.hidden_state_group or host.groups[0]
        settings = json.dumps([host.model, host.hidden_state_layers, settings_identity(host)], sort_keys=True)
        self._keys = KeyMaker.named(settings, host)
        self._prompts: dict[str, _Prompt] = {}
        self._discards: list[str] = []

    @classmethod
    def check(cls, host: HostInfo) -> list[str]:
        """Settings, what the engine hands on; and whether the folder can be written."""
        config = HiddenStatesConfig.parse(host)
        where = f"{_WHERE}.shared_storage_path"
        return unwritable(folder_of(config.shared_storage_path, where), where)

    def on_new_request(self, request: RequestView) -> None:
        """All its tokens so far are its prompt."""
        self._prompts[request.request_id] = _Prompt(list(request.token_ids), self._identity(request))
        if (request.kv_transfer_params or {}).get("hidden_states_path") is not None:
            logger.warning("%s: hidden_states_path is ignored: the engine names files", request.request_id)

    def _identity(self, request: RequestView) -> str:
        chain = self._keys.chain(request)
        about = None if chain is None else repr((chain.root.hex(), request.multimodal_items))
        return "" if about is None else hashlib.sha256(about.encode()).hexdigest()

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Nothing."""
        return 0, False

    def update_state_after_alloc(self, request: RequestView, block_ids: BlockIds, num_external_tokens: int) -> None:
        """Nothing to plan."""

    def build_connector_meta(self, step: StepView) -> HiddenStatesMetadata:
        """What the step computes, and a file for each prompt that it completes."""
        metadata = HiddenStatesMetadata([], self._discards, step.finished_req_ids)
        self._discards = []
        size = self._group.block_tokens
        for item in step.scheduled:
            if (prompt := self._prompts.get(item.request_id)) is None:
                continue
            first, end = item.num_computed_tokens, item.num_computed_tokens + item.num_scheduled_tokens
            table, num_prompt, file = item.block_ids[self._group.group_id], len(prompt.token_ids), None
            if first >= num_prompt or prompt.name:
                continue
            if end >= num_prompt:
                prompt.name = _file_name(item.request_id)
                prompt.block_ids = frozenset().union(*item.block_ids)
                blocks = table[: -(-num_prompt // size)]
                file = PromptFile(prompt.name, prompt.token_ids, blocks, prompt.identity)
            metadata.parts.append(StepPart(item.request_id, first, end - first, table[first // size], file))
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What was computed over blocks that another connector failed to load is wrong, and computed again."""
        for prompt in self._prompts.values() if connector_output.invalid_block_ids else ():
            if prompt.name and prompt.block_ids & connector_output.invalid_block_ids:
                self._discards.append(prompt.name)
                prompt.name = ""

    def request_finished(self, request: RequestView, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """The path of the prompt's file. Its blocks may be freed: no copy of ours reads them any more."""
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is None or not prompt.name:
            return False, None
        if request.was_cut_short:
            self._discards.append(prompt.name)
            return False, None
        return False, {"hidden_states_path": str(self._folder / prompt.name)}

    def reset_cache(self) -> bool:
        """True: no KV is stored here, and files that requests were promised stay."""
        return True

    def shutdown(self) -> None:
        """Delete what the worker was not told to delete; it has stopped by now."""
        for name in self._discards:
            _discard(self._folder / name)


class HiddenStatesWorkerSide(WorkerSide):
    """Collects rows and has them written. Every rank has all of them, so only the first one does."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self.config = HiddenStatesConfig.parse(host)
        self.clock: Clock = SystemClock()
        self._folder = self.config.folder()
        self._writer = IoThreads[Callable[[], None]]("kvferry-hidden-states", 1, lambda job: job())
        self._next_sweep_s = self.clock.now()
        self._group = host.hidden_state_group or host.groups[0]
        self._ratio = 1
        """Kernel blocks of a block."""
        self._pages: torch.Tensor | None = None
        """[kernel blocks, states, tokens, hidden], where the host pages them."""
        self._lacking: set[str] = set()
        """Requests that had a step without hidden states."""
        self._kept: dict[str, list[torch.Tensor]] = {}
        """Rows [tokens, states, hidden] of prompts that are not whole yet, where there are no pages."""
        self._step_rows: tuple[torch.Tensor, Any] | None = None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the pages, if there are any, and into what a block is cut."""
        self._pages = next((pages for name, pages in kv_caches.items() if HIDDEN_STATE_LAYER in name), None)
        self._ratio = kv_caches[self._group.layer_names[0]].shape[0] // self.host.num_blocks

    def handle_preemptions(self, metadata: KVConnectorMetadata) -> None:
        """The first hook of a step: rows of one that broke are forgotten."""
        self._step_rows = None

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Nothing."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any) -> None:
        """Note that this step's hidden states are there."""
        if HIDDEN_STATE_LAYER in layer_name:
            self._step_rows = kv_layer, attn_metadata

    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        """Take this step's rows, and order what is to be written, deleted and swept; waits for none of it."""
        assert isinstance(metadata, HiddenStatesMetadata)
        for part in metadata.parts if self.host.rank == 0 else ():
            if self._step_rows is None:
                self._lacking.add(part.request_id)
            elif self._pages is None:
                self._keep(part, *self._step_rows)
            if part.file is not None:
                self._save(part.file, self._rows(part.request_id, part.file))
        self._step_rows = None
        for request_id in metadata.finished_ids:
            self._kept.pop(request_id, None)
            self._lacking.discard(request_id)
        for name in metadata.discards if self.host.rank == 0 else ():
            self._submit(partial(_discard, self._folder / name))
        self._sweep_when_due()
        for done in self._writer.take_done():
            if done.error is not None:
                logger.warning("in %s: %s", self._folder, done.error)

    def _keep(self, part: StepPart, rows: torch.Tensor, batch: Any) -> None:
        """Our engine's rows: the request's are those from its first position, in its (kernel) block, on."""
        kernel_block = part.first % self._group.block_tokens * self._ratio // self._group.block_tokens
        block_id = part.block_id * self._ratio + kernel_block
        is_start = (batch.write_blocks[self._group.group_id] == block_id) & (batch.positions == part.first)
        start = int(is_start.nonzero()[0])
        kept = self._kept.setdefault(part.request_id, [])
        if part.first == 0:  # again after a preemption
            kept.clear()
        kept.append(rows[start : start + part.num_tokens].clone())

    def _rows(self, request_id: str, file: PromptFile) -> torch.Tensor | None:
        """A copy [tokens, states, hidden] of the prompt's rows; None when some are missing."""
        num_tokens = len(file.token_ids)
        kept = self._kept.pop(request_id, [])
        if request_id in self._lacking:
            return None
        if self._pages is None:
            return torch.cat(kept)[:num_tokens]
        block_tokens = self._group.block_tokens
        starts = torch.tensor(file.block_ids, device=self._pages.device)[:, None] * block_tokens
        places = (starts + torch.arange(block_tokens, device=self._pages.device)).flatten()[:num_tokens]
        size = self._pages.shape[2]
        return self._pages[places // size, :, places % size]

    def _save(self, file: PromptFile, rows: torch.Tensor | None) -> None:
        path, ready = self._folder / file.name, None
        if rows is None:
            self._submit(partial(_write_error, path, "the engine did not hand on all of its hidden states"))
        elif self._writer.num_queued(Urgency.STORE) >= self.config.max_pending_files:
            self._submit(partial(_write_error, path, "max_pending_files others were waiting to be written"))
        else:
            if rows.device.type != "cpu":
                ready = torch.Event(device=rows.device)
                ready.record(torch.accelerator.current_stream(rows.device))
            self._submit(partial(self._write, path, file, rows, ready))

    def _write(self, path: Path, file: PromptFile, rows: torch.Tensor, ready: Any) -> None:
        """On the writer's thread."""
        if ready is not None:
            ready.synchronize()
        tensors = {"hidden_states": rows.cpu().contiguous(), "token_ids": torch.tensor(file.token_ids)}
        layers = json.dumps(self.host.hidden_state_layers)
        about = {"hidden_state_layers": layers, "model": self.host.model, "identity": file.identity, "name": path.name}
        try:
            _write_file(path, _with_digest(save(tensors, {**about, "digest": _NO_DIGEST})))
        except OSError as err:
            _write_error(path, str(err))

    def _submit(self, job: Callable[[], None]) -> None:
        self._writer.submit(Urgency.STORE, job)

    def _sweep_when_due(self) -> None:
        ttl_s, now_s = self.config.ttl_s, self.clock.now()
        if ttl_s is not None and now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + min(ttl_s, _SWEEP_EVERY_S)
            self._submit(partial(_sweep, self._folder, time.time() - ttl_s))

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Nothing: no copy reads the pool after its step."""
        return KVConnectorTransferResults()

    def shutdown(self) -> None:
        """Write what is ordered; blocks for at most half a minute."""
        self._writer.drain(_CLOSE_LIMIT_S)
        self._writer.close(0.0)


def load_hidden_states(
    path: str | Path,
    timeout_s: float = 30.0,
    token_ids: Sequence[int] | None = None,
    *,
    layers: Sequence[int] | None = None,
    verify: bool = True,
) -> dict[str, torch.Tensor]:
    """What is in the file of a path that a request returned: "hidden_states" [tokens, states, hidden], "token_ids".

    Waits for the file, at most `timeout_s` seconds. Raises TierUnavailable when it did not come, or will not, and
    TierCorrupt when its bytes are not those that were written, or were written for another request under another name
    (unless `verify` is false; files of earlier versions carry no digest and no name to tell by), `token_ids` are given
    and the file is of another prompt, or `layers` are given and it holds the hidden states of others.
    """
    deadline_s, failure = time.monotonic() + timeout_s, Path(f"{path}.error")
    while not Path(path).exists():
        if failure.exists():
            raise TierUnavailable(f"{path} was not written: {failure.read_text()}")
        if time.monotonic() >= deadline_s:
            raise TierUnavailable(f"{path} did not appear within {timeout_s} s: see the engine's log")
        time.sleep(_POLL_S)
    data = Path(path).read_bytes()
    try:
        if verify and not _is_as_written(data):
            raise TierCorrupt(f"{path} changed after it was written (its bytes have another digest): delete it")
        name = _metadata(data).get("name", Path(path).name)
        if verify and name != Path(path).name:
            raise TierCorrupt(f"{path} is another request's file: it was written as {name!r}; verify=False takes it")
        tensors: dict[str, torch.Tensor] = load(data)
        held_ids, held = tensors["token_ids"].tolist(), _metadata(data).get("hidden_state_layers")
    except (SafetensorError, ValueError, KeyError, RuntimeError) as err:  # RuntimeError: as shapes no tensor can have
        raise TierCorrupt(f"{path} cannot be read as safetensors, so it changed after it was written: {err}") from err
    if token_ids is not None and held_ids != list(token_ids):
        raise TierCorrupt(
            f"{path} has the hidden states of {len(tensors['token_ids'])} other tokens than were asked for"
        )
    if layers is not None and held != json.dumps(sorted(set(layers))):
        raise TierCorrupt(f"{path} has the hidden states of layers {held or 'unknown'}, not of {sorted(set(layers))}")
    return tensors


def _header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _metadata(data: bytes) -> dict[str, str]:
    """The header's texts; ValueError for what is no header."""
    header = json.loads(data[8 : _header_end(data)])
    found = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("the header is not that of a safetensors file")
    return found


def _field(text: str) -> bytes:
    return b'"digest":"%s"' % text.encode()


def _with_digest(data: bytes) -> bytes:
    """A safetensors file with its digest in the place kept for it: of all its bytes, with zeros there."""
    end = _header_end(data)
    header = data[:end].replace(_field(_NO_DIGEST), _field(digest(data).hex()), 1)
    assert header != data[:end], "no place was kept for the digest"
    return header + data[end:]


def _is_as_written(data: bytes) -> bool:
    """Whether the digest in the file's metadata is that of the file; also where there is none."""
    end = _header_end(data)
    told = _metadata(data).get("digest")
    if told is None:
        return True
    header = data[:end].replace(_field(told), _field(_NO_DIGEST), 1)
    return bool(digest(header + data[end:]).hex() == told)


def _file_name(request_id: str) -> str:
    """A plain name that nobody can guess, whatever the id is."""
    readable = re.sub(r"[^\w-]", "_", request_id, flags=re.ASCII)[:64] or "_"
    return f"{readable}-{secrets.token_hex(8)}.safetensors"


def _write_file(path: Path, data: bytes) -> None:
    """Make a file appear, whole. OSError: there is none."""
    partial_file = path.with_name(f"{path.name}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(partial_file, flags, 0o600), "wb") as stream:
            stream.write(data)
        partial_file.rename(path)
    except OSError:
        partial_file.unlink(missing_ok=True)
        raise


def _write_error(path: Path, why: str) -> None:
    logger.warning("%s is not written: %s", path, why)
    _write_file(path.with_name(f"{path.name}.error"), why.encode())


def _discard(path: Path) -> None:
    for each in (path, path.with_name(f"{path.name}.error")):
        each.unlink(missing_ok=True)


def _sweep(folder: Path, oldest_s: float) -> None:
    """Delete files of ours last written before `oldest_s` (seconds since the epoch)."""
    for path in folder.iterdir():
        about = path.lstat()
        if _OURS.fullmatch(path.name) and stat.S_ISREG(about.st_mode) and about.st_mtime < oldest_s:
            path.unlink(missing_ok=True)


class ExampleHiddenStatesConnector(
    facade_mixin(HiddenStatesSchedulerSide, HiddenStatesWorkerSide, KVConnectorRole.SCHEDULER),  # type: ignore[misc]
    KVConnectorBase_V1,
    SupportsHMA,
):
    """Writes hidden states of prompts to files; settings: `HiddenStatesConfig`."""

    supports_v2_model_runner = True
