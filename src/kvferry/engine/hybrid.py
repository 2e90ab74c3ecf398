"""Whether a model's KV layers are kept in several groups (hybrid KV cache), so that windowed layers keep little.

HMA is vLLM's name for it. It pays only where layers differ in what they keep, and works only with a connector that
understands several groups. Where all layers have one window, one group does; it drops old KV under the same conditions,
for connectors that know no groups know no null blocks either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from kvferry.config import KVTransferConfig
from kvferry.contract import KVConnectorFactory
from kvferry.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HybridChoice:
    """The decision, why, and what to warn of when it costs the user something."""

    enabled: bool
    reason: str
    warning: str | None = None
    is_windowed: bool = False
    """One group, of layers that all have one window, and what has left it is freed."""


def decide_hybrid(
    transfer: KVTransferConfig | None, disabled: bool | None, windows: Sequence[int | None], max_model_len: int
) -> HybridChoice:
    """Decide for a model whose layers see `windows[layer]` tokens back (None: all of them).

    `disabled` is the user's `disable_hybrid_kv_cache_manager`; None leaves the choice here. Raises ConfigError when
    it is False and a connector that does not support several groups would have to take them.
    """
    kept_tokens = [min(window or max_model_len, max_model_len) for window in windows]
    if set(kept_tokens) == {max_model_len}:
        return HybridChoice(False, "not needed: all layers keep equally many tokens of a request, which is all")
    unable = [] if transfer is None else without_hma(transfer)
    names = " and ".join(unable)
    lacks = f"{names} does not support hybrid KV caches (several KV cache groups, SupportsHMA)"
    if len(set(kept_tokens)) == 1:
        alike = f"not needed: all layers keep equally many tokens of a request, {kept_tokens[0]} in one group"
        if disabled or unable:
            why = "disable_hybrid_kv_cache_manager is set" if disabled else lacks
            return HybridChoice(False, f"{alike}; but all are kept, for {why}")
        return HybridChoice(False, alike, is_windowed=True)
    if disabled:
        return HybridChoice(False, "disable_hybrid_kv_cache_manager is set")
    if not unable:
        by_whom = "no connector objects" if transfer is None else f"{transfer.kv_connector} supports it"
        return HybridChoice(True, f"layers keep {_listed(kept_tokens)} tokens of a request, and {by_whom}")
    if disabled is False:
        raise ConfigError(
            f"disable_hybrid_kv_cache_manager=False, but {lacks}: leave {names} out or take a connector that supports "
            "them, or set disable_hybrid_kv_cache_manager=True"
        )
    short, whole = sum(kept_tokens), len(kept_tokens) * max_model_len
    cost = (
        f"a request of {max_model_len} tokens keeps {whole} tokens of KV over all layers instead of {short}, "
        f"{whole / short:.1f} times as much"
    )
    warning = (
        f"hybrid KV cache switched off: {lacks}; {cost}. Take a connector that supports them, or set "
        "disable_hybrid_kv_cache_manager=True to accept this"
    )
    return HybridChoice(False, lacks, warning)


def without_hma(transfer: KVTransferConfig) -> list[str]:
    """The configured connector if it does not support several KV cache groups; of a composite, those of its parts."""
    if KVConnectorFactory.supports_hma_config(transfer):
        return []
    unable = [name for part in parts_of(transfer) for name in without_hma(part)]
    return list(dict.fromkeys(unable)) or [str(transfer.kv_connector)]


def parts_of(transfer: KVTransferConfig) -> list[KVTransferConfig]:
    """The configurations of the connectors a composite is made of; of any other connector, none."""
    parts = transfer.kv_connector_extra_config.get("connectors")
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) and "kv_connector" in part for part in parts):
        return []
    own = ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config")
    inherited = {f.name: getattr(transfer, f.name) for f in fields(transfer) if f.name not in own}
    return [KVTransferConfig.parse({**inherited, **part}) for part in parts]


def _listed(kept_tokens: Sequence[int]) -> str:
    return " or ".join(map(str, sorted(set(kept_tokens))))
