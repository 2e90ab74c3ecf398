"""What an engine decides before it takes memory: sizes, KV groups, layout, runner. For `LLM` and `kvferry doctor`."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, replace

from kvferry.config import KVTransferConfig, v2_runner_environment
from kvferry.contract import KVCacheConfig, KVCacheSpec, KVConnectorFactory
from kvferry.contract.class_hooks import ask_class
from kvferry.contract.host import groups_of
from kvferry.engine.config import (
    CacheConfig,
    EngineConfig,
    EngineOptions,
    KVBudget,
    LoadConfig,
    ModelConfig,
    SchedulerConfig,
    resolve_kv_budget,
)
from kvferry.engine.hybrid import HybridChoice, decide_hybrid
from kvferry.engine.kv_groups import full_attention_specs, grouped_specs, kv_cache_config_for
from kvferry.engine.layout_choice import LayoutChoice, choose_kernel_block, choose_layout
from kvferry.engine.model_loader import ModelShape, architecture_of
from kvferry.engine.runner_choice import RunnerChoice, choose_model_runner, v2_support, without_v2
from kvferry.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """The engine's configuration, and the decisions that users may want explained."""

    config: EngineConfig
    kv_cache_config: KVCacheConfig
    hybrid: HybridChoice
    runner: RunnerChoice
    layout: LayoutChoice

    def log(self) -> None:
        """Tell the decisions, and warn of those that cost something."""
        for warning in (self.hybrid.warning, *self.runner.warnings, self.layout.warning):
            if warning is not None:
                logger.warning("%s", warning)
        logger.info("model runner %s: %s", "V2" if self.runner.use_v2 else "V1", self.runner.reason)
        logger.debug("hybrid KV cache %s: %s", "on" if self.hybrid.enabled else "off", self.hybrid.reason)
        logger.debug("KV layout %s: %s", self.layout.layout, self.layout.reason)


def plan_engine(model: ModelShape, options: EngineOptions, transfer: KVTransferConfig) -> EnginePlan:
    """Plan without taking memory or opening anything. Raises ConfigError for settings that cannot work together."""
    configured = transfer if transfer.is_kv_transfer_instance else None
    if options.hidden_state_layers and configured is None:
        raise ConfigError("hidden_state_layers is set but there is no connector to take them: configure one")
    connector = None if configured is None else KVConnectorFactory.resolve(configured)
    runner = choose_model_runner(
        v2_runner_environment(),
        options.use_v2_model_runner,
        [] if configured is None else without_v2(configured),
        type(model).__name__ if model.hf_config is None else architecture_of(model.hf_config),
        v2_support(options.device, options.v2_model_architectures),
    )
    groups = [full_attention_specs(model.layers, options.block_size, model.dtype)]
    budget = _budget(groups, options, model)
    hybrid = decide_hybrid(
        configured,
        options.disable_hybrid_kv_cache_manager,
        [layer.window_tokens for layer in model.layers],
        budget.max_model_len,
    )
    if hybrid.enabled or hybrid.is_windowed:
        groups = grouped_specs(model.layers, options.block_size, model.dtype, budget.max_model_len)
        budget = _budget(groups, options, model)
    config = EngineConfig(
        cache_config=CacheConfig(
            options.block_size,
            budget.num_blocks,
            options.enable_prefix_caching,
            kv_cache_layout=choose_layout(options.kv_cache_layout, None, None).layout,
            kernel_block_size=choose_kernel_block(options.kernel_block_size, options.block_size, runner.use_v2),
        ),
        model_config=ModelConfig(
            model=model.path,
            dtype=model.dtype,
            max_model_len=budget.max_model_len,
            seed=options.seed,
            hf_config=model.hf_config,
            is_converted_at_start=getattr(model, "is_converted_at_start", False),
            weights_stamp=getattr(model, "weights_stamp", None),
        ),
        scheduler_config=SchedulerConfig(options.max_num_seqs, options.max_num_batched_tokens, not hybrid.enabled),
        kv_transfer_config=configured,
        instance_id=secrets.token_hex(8),
        use_v2_model_runner=runner.use_v2,
        load_config=LoadConfig(model.load_format),
    )
    hook = "get_required_kvcache_layout"
    required = None if connector is None else ask_class(connector.connector_class, hook, config)
    layout = choose_layout(options.kv_cache_layout, None if connector is None else connector.name, required)
    config = replace(config, cache_config=replace(config.cache_config, kv_cache_layout=layout.layout))
    return EnginePlan(config, kv_cache_config_for(budget.num_blocks, groups, layout.layout), hybrid, runner, layout)


def _budget(groups: list[dict[str, KVCacheSpec]], options: EngineOptions, model: ModelShape) -> KVBudget:
    """The size of the KV cache when layers are grouped like this; blocks of all groups are as large as the largest."""
    block_bytes = max(sum(spec.page_size_bytes for spec in group.values()) for group in groups)
    infos = groups_of(kv_cache_config_for(1, groups))
    step_tokens = options.max_num_batched_tokens
    return resolve_kv_budget(
        options,
        block_bytes,
        model.max_model_len,
        lambda num_tokens: sum(group.most_blocks(0, num_tokens, step_tokens) for group in infos),
    )
