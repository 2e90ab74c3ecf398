"""How the engine's KV lies in memory: `kv_cache_layout`, and the blocks its attention works in.

A layout names the dimensions (L)ayer, (B)lock, (H)ead, toke(N), (C)ontent, outermost first. BL...: all layers of a
block are one byte run. LB...: each layer is a region of its own. Told in docs/guides/runners.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.config import shown
from kvferry.errors import ConfigError, did_you_mean

LAYOUTS = ("BLNHC", "BLHNC", "LBNHC", "LBHNC")
LAYOUT_ALIASES = {"NHD": "LBNHC", "HND": "LBHNC"}
"""vLLM's short names."""
_KERNEL_BLOCK_TOKENS = (32, 16)


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """The decision, why, and what the user should hear of."""

    layout: str
    reason: str
    warning: str | None = None


def check_layout(name: object) -> str:
    """`kv_cache_layout` as one of LAYOUTS, or "auto". ConfigError names the nearest known name."""
    if name == "auto" or name in LAYOUTS:
        return str(name)
    if isinstance(name, str) and name in LAYOUT_ALIASES:
        return LAYOUT_ALIASES[name]
    hint = did_you_mean(
        name.upper() if isinstance(name, str) else "", ["auto", *LAYOUTS, *LAYOUT_ALIASES], list_all=True
    )
    raise ConfigError(f"kv_cache_layout={shown(name)} is not a layout this engine has{hint}")


def choose_layout(setting: str, connector: str | None, required: str | None) -> LayoutChoice:
    """The user before the connector before the default.

    `required` is what the connector (named `connector`) answered to `get_required_kvcache_layout`.
    """
    wanted = None if required is None else LAYOUT_ALIASES.get(required, required)
    if setting != "auto":
        reason = f"kv_cache_layout={setting}"
        if wanted in (None, setting):
            return LayoutChoice(setting, reason)
        warning = f"{connector} requires the KV layout {required}, but {reason} is set: leave that out"
        return LayoutChoice(setting, reason, warning)
    if wanted is None:
        return LayoutChoice(LAYOUTS[0], "the default: all layers of a block are one byte run")
    if wanted in LAYOUTS:
        return LayoutChoice(wanted, f"{connector} requires {required}")
    warning = (
        f"{connector} requires the KV layout {required}, which this engine does not have (only {', '.join(LAYOUTS)}), "
        f"and gets {LAYOUTS[0]}: use a connector that takes any layout, or vLLM as the host"
    )
    return LayoutChoice(LAYOUTS[0], f"the default; {required} is not to be had", warning)


def choose_kernel_block(setting: int | None, block_size: int, use_v2: bool) -> int:
    """Tokens of the blocks attention works in: part of a block with V2, the whole of it with V1.

    ConfigError when `setting` (`kernel_block_size`) does not divide the block, or needs V2 and there is none.
    """
    if setting is None:
        parts = [tokens for tokens in _KERNEL_BLOCK_TOKENS if use_v2 and block_size % tokens == 0]
        return parts[0] if parts else block_size
    if block_size % setting:
        raise ConfigError(f"kernel_block_size={setting} does not divide block_size={block_size}")
    if setting != block_size and not use_v2:
        raise ConfigError(
            f"kernel_block_size={setting} needs the second model runner, which is not used here: leave it out, or set "
            "use_v2_model_runner=True (`kvferry doctor` says what keeps it off)"
        )
    return setting
