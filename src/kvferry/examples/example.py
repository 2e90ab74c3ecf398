"""ExampleConnector: KV in a shared folder, layer by layer. The connector to read first (docs/guides/example.md).

    <shared_storage_path>/<namespace>/<key>/<layer>.<rank>.safetensors     one block of one layer
    <shared_storage_path>/<namespace>/tmp-<random>/<number>/...            blocks that are being written

A block's folder gets its name when all its files are written and the step that computed it is known to be good, so
other engines see it whole or not at all. Loads and saves run within the step: simple, right, and slow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kvferry.config import parse_settings
from kvferry.contract.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from kvferry.contract.facade import facade_mixin
from kvferry.contract.host import HostInfo
from kvferry.contract.identity import KeyMaker, check_identity, settings_identity
from kvferry.contract.kv_cache import KVConnectorOutput
from kvferry.contract.sides import SchedulerSide, WorkerSide
from kvferry.contract.views import BlockIds, RequestView, StepView
from kvferry.errors import ConfigError, TierCorrupt
from kvferry.kv.keys import UNIT_TOKENS, KeyChain, digest
from kvferry.kv.layout import KVLayout
from kvferry.kv.space import folder_of, unwritable
from kvferry.types import NULL_BLOCK_ID, AttentionKind

logger = logging.getLogger(__name__)

_WHERE = "kv_connector_extra_config"
_FORMAT = "kvferry-example-1"
_MAX_HEADER_BYTES = 4096
"""Of a block's file, beside the page."""


@dataclass(frozen=True, slots=True)
class ExampleConfig:
    """Settings of the example, in `kv_connector_extra_config`."""

    shared_storage_path: str
    """Folder of the files, made where missing. The connector never evicts a file."""
    weights_version: str | None = None
    """Name of the weights in keys, instead of a fingerprint of their files; required for random weights."""


@dataclass(frozen=True, slots=True)
class BlockMove:
    """One block of the pool, the key of its content (hex), and the folder to read it from or write it to."""

    block_id: int
    key: str
    folder: str


@dataclass(slots=True)
class ExampleMetadata(KVConnectorMetadata):
    """A step's orders, from the scheduler side to the workers."""

    loads: list[BlockMove] = field(default_factory=list)
    saves: list[BlockMove] = field(default_factory=list)


@dataclass(slots=True)
class ExampleReport(KVConnectorWorkerMetadata):
    """What the workers have made of them."""

    saved: set[str] = field(default_factory=set)
    """Folders that every worker has written its files to."""
    unsaved: set[str] = field(default_factory=set)
    unloaded: set[str] = field(default_factory=set)
    """Keys whose load failed."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> ExampleReport:
        """Of two ranks."""
        assert isinstance(other, ExampleReport)
        saved, unsaved = self.saved & other.saved, self.unsaved | other.unsaved
        return ExampleReport(saved, unsaved, self.unloaded | other.unloaded)


@dataclass(slots=True)
class _RequestState:
    view: RequestView
    chain: KeyChain
    num_local_tokens: int = 0


class ExampleSchedulerSide(SchedulerSide):
    """Knows keys and folders: looks blocks up, orders loads and saves, publishes what was saved."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        config = parse_settings(ExampleConfig, host.extra_config, _WHERE)
        group = _only_group(host)
        self._block_tokens = group.block_tokens
        self._keys = KeyMaker.of(host, config.weights_version)
        self._file_names = {_file_name(layer, r) for layer in group.layer_names for r in range(host.world_size)}
        settings = sorted(settings_identity(host).items())
        description = [_FORMAT, group.block_tokens, host.world_size, group.layer_names, settings]
        namespace = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:32]
        self._root = folder_of(config.shared_storage_path, f"{_WHERE}.shared_storage_path").absolute() / namespace
        self._tmp = self._root / f"tmp-{uuid.uuid4().hex}"
        self._tmp_numbers = count()
        self._requests: dict[str, _RequestState] = {}
        self._loads: list[BlockMove] = []
        self._unpublished: dict[str, tuple[str, str | None]] = {}
        """Temporary folder -> key and LoRA adapter, of the saves that are ordered and may become visible."""
        self._unloadable: set[str] = set()
        """Keys whose load failed. They are no hits until they are saved again, so that nothing loops."""
        try:
            for folder in (self._root.parent, self._root, self._tmp):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            raise ConfigError(f"{_WHERE}.shared_storage_path={config.shared_storage_path!r}: {err}") from err

    @classmethod
    def check(cls, host: HostInfo) -> list[str]:
        """Settings, block size, identity; and whether the folder can be written."""
        config = parse_settings(ExampleConfig, host.extra_config, _WHERE)
        _only_group(host)
        check_identity(host, config.weights_version)
        where = f"{_WHERE}.shared_storage_path"
        return unwritable(folder_of(config.shared_storage_path, where), where)

    def on_new_request(self, request: RequestView) -> None:
        """Begin the request's chain of keys; None when its tokens do not tell what its KV is."""
        if (chain := self._keys.chain(request)) is not None:
            self._requests[request.request_id] = _RequestState(request, chain)

    def get_num_new_matched_tokens(self, request: RequestView, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Claim the stored blocks behind the local ones, leaving a token to compute."""
        state = self._requests.get(request.request_id)
        is_known = state is not None and self._keys.is_certain(request.lora_path)
        if state is None or not is_known or request.skip_reading_prefix_cache or self.host.must_load_early(request):
            return 0, False
        state.num_local_tokens = num_computed_tokens
        num_hits = 0
        for _, key in self._blocks(state, num_computed_tokens, request.num_tokens - 1):
            if not self._is_hit(key):
                break
            num_hits += 1
        return num_hits * self._block_tokens, False

    def update_state_after_alloc(self, request: RequestView, block_ids: BlockIds, num_external_tokens: int) -> None:
        """Order the load of the claimed blocks."""
        if num_external_tokens:
            state = self._requests[request.request_id]
            first = state.num_local_tokens
            self._loads.extend(self._moves(state, first, first + num_external_tokens, block_ids))

    def build_connector_meta(self, step: StepView) -> ExampleMetadata:
        """The loads, and a save of each block that this step completes and nobody has stored."""
        metadata, self._loads = ExampleMetadata(self._loads), []
        for item in step.scheduled:
            if (state := self._requests.get(item.request_id)) is not None:
                end = item.num_computed_tokens + item.num_scheduled_tokens
                for move in self._moves(state, item.num_computed_tokens, end, item.block_ids):
                    if not self._is_hit(move.key):
                        tmp = str(self._tmp / str(next(self._tmp_numbers)))
                        self._unpublished[tmp] = move.key, state.view.lora_path
                        metadata.saves.append(replace(move, folder=tmp))
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Publish what was saved. What was computed beside a failed load, whoever's, may be wrong and never is."""
        failures = getattr(connector_output, "failed_blocks", ())
        if failures or connector_output.invalid_block_ids or connector_output.failed_recving:
            self._unpublished.clear()
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, ExampleReport):
            self._unloadable |= report.unloaded
            for tmp in report.saved | report.unsaved:
                key, lora_path = self._unpublished.pop(tmp, (None, None))
                is_good = key is not None and tmp in report.saved and self._keys.is_certain(lora_path)
                if key is not None and is_good and not self._is_hit(key):
                    self._publish(tmp, key)
                shutil.rmtree(tmp, ignore_errors=True)

    def request_finished(self, request: RequestView, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request; no copy of ours is left running, so its blocks may be freed."""
        self._requests.pop(request.request_id, None)
        return False, None

    def shutdown(self) -> None:
        """Remove the temporary folder."""
        shutil.rmtree(self._tmp, ignore_errors=True)

    def _blocks(self, state: _RequestState, first: int, end: int) -> Iterator[tuple[int, str]]:
        """(position, key) of the blocks that tokens [first, end) complete, as far as their tokens are known."""
        if state.chain.num_media != len(state.view.multimodal_items):
            return  # media came later: the chain does not know them
        state.chain.extend(state.view.token_ids)
        size = self._block_tokens
        for index in range(first // size, min(end, state.chain.num_hashed_tokens) // size):
            yield index, state.chain.value_at((index + 1) * size).hex()

    def _moves(self, state: _RequestState, first: int, end: int, block_ids: BlockIds) -> Iterator[BlockMove]:
        for index, key in self._blocks(state, first, end):
            if (block_id := block_ids[0][index]) != NULL_BLOCK_ID:
                yield BlockMove(block_id, key, str(self._root / key))

    def _is_hit(self, key: str) -> bool:
        try:
            return key not in self._unloadable and self._file_names.issubset(os.listdir(self._root / key))
        except OSError:
            return False

    def _publish(self, tmp: str, key: str) -> None:
        """Make a written folder visible, in place of one that is not whole or could not be loaded."""
        shutil.rmtree(self._root / key, ignore_errors=True)
        try:
            os.rename(tmp, self._root / key)
        except OSError as err:
            logger.warning("block %s is not stored: %s", key, err)
        else:
            self._unloadable.discard(key)


class ExampleWorkerSide(WorkerSide):
    """Copies blocks between this rank's pool and files, one layer at a time."""

    def __init__(self, host: HostInfo) -> None:
        super().__init__(host)
        self._layers: dict[str, torch.Tensor] = {}
        """[blocks, kernel blocks in a block, tokens, heads, content], whatever lies behind in memory."""
        self._loads: list[BlockMove] = []
        self._saves: list[BlockMove] = []
        self._done: set[tuple[int, str]] = set()
        """(block id, layer) of this step's moves that worked."""
        self._error = ""
        self._bad_ids: set[int] = set()
        self._report = ExampleReport()

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Keep a view of each layer. ConfigError for tensors of a shape that is not known."""
        num_blocks = self.host.num_blocks
        KVLayout.from_tensors(kv_caches, self.host.groups, num_blocks)
        for name in _only_group(self.host).layer_names:
            tensor = kv_caches[name]
            self._layers[name] = tensor.view(num_blocks, -1, *tensor.shape[1:]).transpose(2, 3)

    def _label(self, move: BlockMove, layer_name: str) -> str:
        """What the bytes are proved to be: a page that another host's kernels order otherwise is none of ours."""
        return f"{move.key}/{layer_name}.{self.host.rank}/{self.host.page_form(layer_name)}"

    def handle_preemptions(self, metadata: KVConnectorMetadata) -> None:
        """The first hook of a step: take its saves, since the layers' hooks do not see the metadata."""
        assert isinstance(metadata, ExampleMetadata)
        self._loads, self._saves, self._done = [], metadata.saves, set()

    def start_load_kv(self, metadata: KVConnectorMetadata) -> None:
        """Take the step's loads; each layer's files are read right before the layer needs them."""
        assert isinstance(metadata, ExampleMetadata)
        self._loads = metadata.loads

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Read this layer's part of each block."""
        for move in self._loads if layer_name in self._layers else ():
            page, file_name = self._layers[layer_name][move.block_id], _file_name(layer_name, self.host.rank)
            try:
                page.copy_(_read(Path(move.folder) / file_name, self._label(move, layer_name), page))
                self._done.add((move.block_id, layer_name))
            except (OSError, TierCorrupt) as err:
                self._error = str(err)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any) -> None:
        """Write this layer's part of each block."""
        for move in self._saves if layer_name in self._layers else ():
            page, file_name = self._layers[layer_name][move.block_id], _file_name(layer_name, self.host.rank)
            # 8-bit KV is left alone, as in every store: torch has no `isfinite` for all of its types.
            if not self.host.keeps_nan_apart and page.dtype.itemsize > 1 and not page.isfinite().all():
                self._error = f"{layer_name} has a NaN or an infinity in block {move.block_id}"
                continue
            try:
                Path(move.folder).mkdir(mode=0o700, exist_ok=True)
                _write(Path(move.folder) / file_name, self._label(move, layer_name), page)
                self._done.add((move.block_id, layer_name))
            except OSError as err:
                self._error = str(err)

    def wait_for_save(self, metadata: KVConnectorMetadata) -> None:
        """The forward is over: a move worked when it worked for every layer."""
        assert isinstance(metadata, ExampleMetadata)
        unloaded = [move for move in metadata.loads if not self._is_done(move)]
        unsaved = [move for move in metadata.saves if not self._is_done(move)]
        if unloaded or unsaved:
            logger.warning("%d blocks not loaded, %d not saved: %s", len(unloaded), len(unsaved), self._error)
        self._bad_ids |= {move.block_id for move in unloaded}
        self._report.unloaded |= {move.key for move in unloaded}
        self._report.unsaved |= {move.folder for move in unsaved}
        self._report.saved |= {move.folder for move in metadata.saves if move not in unsaved}

    def _is_done(self, move: BlockMove) -> bool:
        return all((move.block_id, name) in self._done for name in self._layers)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Nothing: no transfer outlives its step."""
        return KVConnectorTransferResults()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose load failed; the engine computes them again, or fails their requests."""
        bad_ids, self._bad_ids = self._bad_ids, set()
        return bad_ids

    def build_connector_worker_meta(self) -> ExampleReport:
        """What this step's orders came to."""
        report, self._report = self._report, ExampleReport()
        return report


def _only_group(host: HostInfo) -> Any:
    (group,) = host.groups  # hosts see to it: the class is not SupportsHMA
    if group.kind is AttentionKind.OTHER or group.block_tokens % UNIT_TOKENS:
        raise ConfigError(
            f"the ExampleConnector stores attention KV in blocks of a multiple of {UNIT_TOKENS} tokens; this engine "
            f"has block_size={group.block_tokens} and layers of kind {group.kind.value!r}"
        )
    return group


def _file_name(layer_name: str, rank: int) -> str:
    return f"{layer_name}.{rank}.safetensors"


def _digest(label: str, page: torch.Tensor) -> torch.Tensor:
    """16 bytes that prove content and place of a page that lies in host memory without gaps."""
    return torch.tensor(list(digest(label.encode() + page.flatten().view(torch.uint8).numpy().tobytes())))


def _write(file: Path, label: str, page: torch.Tensor) -> None:
    content = page.cpu().contiguous()
    data = save({"kv": content, "digest": _digest(label, content)})
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as stream:
        stream.write(data)


def _read(file: Path, label: str, like: torch.Tensor) -> torch.Tensor:
    """The page in `file`, proved. OSError or TierCorrupt when there is none."""
    try:
        tensors: dict[str, torch.Tensor] = load(_bytes_of(file, like.nbytes + _MAX_HEADER_BYTES))
        page, proof = tensors["kv"], tensors["digest"]
    except (SafetensorError, KeyError, ValueError, RuntimeError) as err:  # RuntimeError: shapes that torch cannot make
        raise TierCorrupt(f"{file} is damaged: {err}") from err
    if (page.dtype, page.shape) != (like.dtype, like.shape) or proof.tolist() != _digest(label, page).tolist():
        raise TierCorrupt(f"{file} is damaged: its content is not what was written")
    return page


def _bytes_of(file: Path, max_bytes: int) -> bytes:
    """A file's content. TierCorrupt for one that is too large, a link's OSError, and for what is no file at all."""
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise TierCorrupt(f"{file} is no file")
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise TierCorrupt(f"{file} is damaged: it has more than {max_bytes} bytes")
    return data


class ExampleConnector(
    facade_mixin(ExampleSchedulerSide, ExampleWorkerSide, KVConnectorRole.SCHEDULER),  # type: ignore[misc]
    KVConnectorBase_V1,
):
    """Stores blocks in a shared folder and loads them for requests with the same prefix; settings: `ExampleConfig`."""

    supports_v2_model_runner = True

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """The layers' hooks do the work, so they must be called."""
        return True
